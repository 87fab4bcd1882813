"""A plugin of TensorRT 10 and 11 that calls a torch function: its arguments, output shapes and types as data."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torch2rt.backend.tensorrt import TORCH_DTYPES, has_plugins, trt
from torch2rt.errors import ConversionError
from torch2rt.sizes import evaluate_json

NAME, VERSION, NAMESPACE = "TorchFunction", "1", "torch2rt"
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32)  # of what it takes and returns
SIZES = ("dim", "add", "mul", "floordiv", "mod", "python_mod", "minimum", "maximum", "identity")  # shapes consist of


@dataclasses.dataclass(frozen=True)
class TorchCall:
    """The call of a torch function, as JSON values.

    - `function`: `"package.module:name"`, which is imported where the engine runs.
    - `attributes`: its keyword arguments.
    - `inputs`: the types of its tensors. `outputs`: the type of each result, and its sizes as JSON (`sizes.to_json`)
      over the axes of the inputs.
    """

    function: str
    attributes: Mapping[str, Any]
    inputs: Sequence[str]
    outputs: Sequence[tuple[str, Sequence[Any]]]

    def to_bytes(self) -> bytes:
        """The call as the plugin keeps it in an engine."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> TorchCall:
        """The inverse of `to_bytes`."""
        return cls(**json.loads(data))

    @functools.cached_property
    def callable(self) -> Any:
        """The function itself."""
        module, _, name = self.function.partition(":")
        return operator.attrgetter(name)(importlib.import_module(module))

    def shapes(self, inputs: Sequence[Any], expressions: Any) -> list[list[Any]]:
        """The sizes of the results, as TensorRT's expressions of those of the inputs."""
        operations = _Expressions(expressions).operations
        trees = ([evaluate_json(tree, inputs, operations) for tree in sizes] for _, sizes in self.outputs)
        return [[expressions.constant(size) if isinstance(size, int) else size for size in sizes] for sizes in trees]

    def run(self, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        """Write the results of the call on `tensors` into `results`."""
        with torch.no_grad():
            found = self.callable(*tensors, **self.attributes)
        for result, value in zip(results, found if isinstance(found, (tuple, list)) else [found], strict=True):
            if value.shape != result.shape or value.dtype is not result.dtype:
                raise ConversionError(
                    f"{self.function} returns {value.dtype}{list(value.shape)}, and was recorded to return "
                    f"{result.dtype}{list(result.shape)}."
                )
            result.copy_(value)


class _Expressions:
    """The operations of stored sizes on TensorRT's expressions and on integers."""

    def __init__(self, expressions: Any) -> None:
        self.expressions = expressions
        kinds = trt.DimensionOperation
        made = {"add": kinds.SUM, "mul": kinds.PROD, "floordiv": kinds.FLOOR_DIV}
        made |= {"minimum": kinds.MIN, "maximum": kinds.MAX}
        self.operations: dict[str, Any] = {name: functools.partial(self.apply, kind) for name, kind in made.items()}
        self.operations |= {"mod": self.remainder, "python_mod": self.remainder, "identity": lambda a: a}

    def apply(self, kind: Any, *operands: Any) -> Any:
        first, *rest = (self.expressions.constant(x) if isinstance(x, int) else x for x in operands)
        for other in rest:
            first = self.expressions.operation(kind, first, other)
        return first

    def remainder(self, a: Any, b: Any) -> Any:
        kinds = trt.DimensionOperation
        whole = self.apply(kinds.PROD, self.apply(kinds.FLOOR_DIV, a, b), b)
        return self.apply(kinds.SUB, a, whole)


class _Memory:
    """A piece of the GPU's memory, for torch."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def tensor_at(address: int, desc: Any) -> torch.Tensor:
    """The tensor that TensorRT describes, without a copy."""
    dtype, shape = TORCH_DTYPES[desc.type], tuple(desc.dims)
    count = functools.reduce(operator.mul, shape, 1)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cuda")
    return torch.as_tensor(_Memory(address, count * dtype.itemsize), device="cuda").view(dtype).reshape(shape)


_kept: list[Any] = []  # all plugins: those of TensorRT 10.3 free memory that is not theirs when Python frees them


@functools.cache
def _classes() -> tuple[Any, Any]:
    """The plugin and its creator, which derive from TensorRT's classes."""
    if not has_plugins():
        raise ConversionError("TensorRT for RTX has no plugins")

    class TorchFunction(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[name-defined,misc]
        def __init__(self, call: TorchCall) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.num_outputs = len(call.outputs)
            self.call = call
            self.words = _words(call)
            _kept.append(self)

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return TorchFunction(self.call)

        def get_output_data_types(self, input_types: Any) -> Any:
            types = {torch_type: kind for kind, torch_type in TORCH_DTYPES.items()}
            return [types[getattr(torch, name)] for name, _ in self.call.outputs]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, expr_builder: Any) -> Any:
            return [trt.DimsExprs(sizes) for sizes in self.call.shapes(inputs, expr_builder)]

        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            names = [*self.call.inputs, *(name for name, _ in self.call.outputs)]
            desc = in_out[pos].desc
            return desc.format == trt.TensorFormat.LINEAR and TORCH_DTYPES[desc.type] is getattr(torch, names[pos])

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, resource_context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return _fields(self.words)

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> int:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                if torch.cuda.is_current_stream_capturing():
                    return 1  # what torch allocates here would be given to others before a replay uses it again
                given = [tensor_at(address, desc) for address, desc in zip(inputs, input_desc, strict=True)]
                results = [tensor_at(address, desc) for address, desc in zip(outputs, output_desc, strict=True)]
                self.call.run(given, results)
            return 0

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return TorchFunction(_call_in(fields))

    return TorchFunction, Creator


def _words(call: TorchCall) -> Any:
    """A call as numbers, four bytes each."""
    data = call.to_bytes()
    return np.frombuffer(data + b" " * (-len(data) % 4), dtype=np.int32)


def _fields(words: Any) -> Any:
    """A field for each number, as TensorRT 10.3 reads an array as so many of its first element.

    A field does not keep its array alive.
    """
    kind = trt.PluginFieldType.INT32
    return trt.PluginFieldCollection([trt.PluginField(str(i), words[i : i + 1], kind) for i in range(len(words))])


def _call_in(fields: Any) -> TorchCall:
    words = {int(field.name): np.asarray(field.data).reshape(-1)[0] for field in fields}
    return TorchCall.from_bytes(np.array([words[i] for i in range(len(words))], dtype=np.int32).tobytes())


_registered: list[Any] = []  # TensorRT does not keep the creator itself


def register() -> None:
    """Have TensorRT know the plugin, for engines that are read; nothing where there are no plugins."""
    if has_plugins() and not _registered:
        creator = _classes()[1]()
        if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
            raise ConversionError("TensorRT refuses the creator of torch2rt's plugin")
        _registered.append(creator)


def create(call: TorchCall) -> Any:
    """The plugin of a call."""
    register()
    return _classes()[0](call)
