"""The value that passes from `build` to `TRTModule`, and through files."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch2rt.engine.report import Report
from torch2rt.engine.variant import EngineVariant
from torch2rt.errors import EngineError
from torch2rt.interface import Interface


@dataclasses.dataclass(frozen=True, repr=False)
class Engine:
    """A serialized TensorRT engine with all that is needed to call it: `torch2rt.build` makes it, `TRTModule` runs it.

    - `data`: the plan, as TensorRT deserializes it. `bytes(engine)` is the same, `len(engine.data)` its size.
    - `interface`: the calling convention: names, dtypes and ranges of the inputs, and the structure around them.
    - `made_by`: the TensorRT that built it (`flavour`, `version`), and the GPUs it was built for (`target`, in words).
    - `report`: what was verified of the conversion, what it assumes, and what its calls need.
    - `facts`: what `torch2rt inspect` tells of the network, as JSON values: dtypes and shapes of the outputs, layers.
    - `variants`: where several engines serve the range together, what each is; their plans follow each other in `data`.
    - `kernels`: what TensorRT for RTX has compiled of it, by GPU, for each engine; known of files of `torch2rt.save`.

    Where the engine was loaded by `torch2rt.load`, `data` is memory of the file, and no `bytes`.

    >>> from torch2rt import build, lower, trace
    >>> engine = build(lower(trace(torch.nn.ReLU(), [torch.randn(2, 3)])))
    >>> engine.interface.outputs
    ['output_0']
    """

    data: bytes | memoryview
    interface: Interface
    made_by: Mapping[str, str]
    report: Report = dataclasses.field(default_factory=Report)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variants: tuple[EngineVariant, ...] = ()
    kernels: Mapping[str, Sequence[bytes | memoryview]] = dataclasses.field(default_factory=dict, compare=False)

    def each(self) -> list[Engine]:
        """The engines that this one holds, each by itself: copies of their plans, or this one where it is the only.

        Of a plan that is memory of a file there is no copy.
        """
        if not self.variants:
            return [self]
        ends = list(itertools.accumulate(variant.size for variant in self.variants))
        return [
            dataclasses.replace(
                self,
                data=self.data[end - v.size : end],
                interface=v.interface,
                variants=(),
                kernels={gpu: [blobs[i]] for gpu, blobs in self.kernels.items() if i < len(blobs)},
            )
            for i, (v, end) in enumerate(zip(self.variants, ends, strict=True))
        ]

    def __bytes__(self) -> bytes:
        return bytes(self.data)

    def describe(self) -> str:
        """Inputs, outputs, what calls need, and the size, such as `x: float32[1..4, 3] -> output_0; 0.1 MiB`."""
        inputs = ", ".join(f"{spec.name}: {spec.describe()}" for spec in self.interface.inputs)
        needs = "".join(f"; needs {text}" for _, text in self.interface.constraints)
        size = f"{len(self.data) / 2**20:.1f} MiB"
        if self.variants:
            size += f" in {len(self.variants)} engines" + "".join(f"\n  {variant}" for variant in self.variants)
        return f"{inputs} -> {', '.join(self.interface.outputs)}{needs}; {size}"

    def __repr__(self) -> str:
        return f"Engine({self.describe()})"

    def __copy__(self) -> Engine:
        return dataclasses.replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copy of everything but the plan, which never changes and may have gigabytes."""
        others = (field.name for field in dataclasses.fields(self) if field.name not in ("data", "kernels"))
        return dataclasses.replace(self, **{name: copy.deepcopy(getattr(self, name), memo) for name in others})

    def __reduce__(self) -> Any:
        """Pickle the plan as a tensor: torch.save writes tensors as they are, and bytes as text of twice the size."""
        others = self.interface, dict(self.made_by), self.report, dict(self.facts), self.variants
        return _unpickled, (to_tensor(self.data), *others)


def _unpickled(data: torch.Tensor, *others: Any) -> Engine:
    return Engine(to_bytes(data, "data"), *others)


def to_tensor(data: bytes | memoryview) -> torch.Tensor:
    """Bytes as a 1-d uint8 tensor with memory of its own, as a state dict holds them."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def to_bytes(value: Any, name: str) -> bytes:
    """The inverse of `to_tensor`; raises `EngineError` for an entry `name` of a state dict that is something else."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise EngineError(f"'{name}' of the state dict is not a 1-d uint8 tensor.")
    return value.cpu().numpy().tobytes()


def stored(
    state_dict: Mapping[str, Any],
    prefix: str,
    names: Sequence[str],
    missing: list[str],
    unexpected: list[str],
    children: Sequence[str] = (),
) -> list[bytes] | None:
    """The bytes of a module that keeps these entries and no others in a state dict; `None` where one is missing.

    `missing` and `unexpected` are the lists that torch's `_load_from_state_dict` is given. Entries of `children` are
    for these to read.
    """
    keys = [prefix + name for name in names]
    absent = [key for key in keys if key not in state_dict]
    missing.extend(absent)
    others = [key for key in state_dict if key.startswith(prefix) and key not in keys]
    unexpected.extend(key for key in others if key[len(prefix) :].partition(".")[0] not in children)
    return None if absent else [to_bytes(state_dict[key], key) for key in keys]
