"""Several engines behind one module: which of them a call goes to.

Each engine serves the sizes for which the claims of its trace are true. Which engine that is for some shapes is looked
up once and remembered, so that a call costs one look into a dict beyond what it costs with one engine.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch

from torch2rt.engine.engine import Engine
from torch2rt.errors import EngineError, InputError
from torch2rt.interface import Interface, Shape
from torch2rt.runtime.loaded_engine import LoadedEngine
from torch2rt.runtime.pool import ContextPool

_SHAPE = operator.attrgetter("shape")
REMEMBERED = 4096  # shapes, of which the table is emptied when it is full


class Dispatch:
    """Which of several interfaces takes a call; `interface` is the calling convention of all of them together."""

    def __init__(self, whole: Interface, parts: Sequence[Interface]) -> None:
        self.parts = list(parts)
        self.interface = _Joint.of(whole, self)

    def find(self, shapes: Sequence[Shape]) -> int:
        """The place of the first that takes these shapes; raises `InputError` if none does."""
        for index, part in enumerate(self.parts):
            if part.serves(shapes):
                return index
        self.interface.check(list(shapes), [spec.dtype for spec in self.interface.inputs])
        got = ", ".join(f"{spec.name} {tuple(s)}" for spec, s in zip(self.interface.inputs, shapes, strict=True))
        served = "\n".join(f"  {_describe(part)}" for part in self.parts)
        raise InputError(f"None of the engines serves {got}. They serve:\n{served}")


class _Joint(Interface):
    """The calling convention of several engines, whose results may have different forms."""

    dispatch: Dispatch

    @classmethod
    def of(cls, whole: Interface, dispatch: Dispatch) -> _Joint:
        joint = cls(**{field.name: getattr(whole, field.name) for field in dataclasses.fields(Interface)})
        object.__setattr__(joint, "dispatch", dispatch)
        kinds = {part.plain_result for part in dispatch.parts}
        joint.__dict__["plain_result"] = kinds.pop() if len(kinds) == 1 else None
        return joint

    def wrap(self, outputs: Sequence[torch.Tensor], shapes: list[Shape]) -> Any:
        return self.dispatch.parts[self.dispatch.find(shapes)].wrap(outputs, shapes)


class VariantPools:
    """The execution contexts of several engines on one GPU, which is used as the `ContextPool` of one is."""

    def __init__(self, engine: Engine, index: int | None) -> None:
        self.pools: list[ContextPool] = []
        for each in engine.each():
            self.pools.append(ContextPool(LoadedEngine(each, index)))
            index = self.pools[0].index
        self.device, self.index = self.pools[0].device, self.pools[0].index
        self.dispatch = Dispatch(engine.interface, [pool.interface for pool in self.pools])
        self.interface: Interface = self.dispatch.interface
        self.table: dict[tuple[Shape, ...], ContextPool] = {}

    def run(self, tensors: Sequence[torch.Tensor], graph: bool = False, borrow: bool = False) -> list[torch.Tensor]:
        """The outputs of the engine that serves the shapes of these tensors."""
        return self.of(tensors).run(tensors, graph, borrow)

    def of(self, tensors: Sequence[torch.Tensor]) -> ContextPool:
        """The execution contexts of the engine that serves the shapes of these tensors."""
        try:
            return self.table[tuple(map(_SHAPE, tensors))]
        except KeyError:
            return self._find(tensors)
        except AttributeError:  # some are no tensors
            return self.pools[0]

    def _find(self, tensors: Sequence[torch.Tensor]) -> ContextPool:
        for position, tensor in enumerate(tensors):
            self.pools[0].inputs.check_one(position, tensor)
        self.interface.check([tuple(t.shape) for t in tensors], [t.dtype for t in tensors])
        shapes = tuple(tensor.shape for tensor in tensors)
        if len(self.table) >= REMEMBERED:
            self.table = {}
        self.table[shapes] = pool = self.pools[self.dispatch.find(shapes)]
        return pool

    @property
    def uncapturable(self) -> str | None:
        """Why calls of one of the engines cannot be captured in CUDA graphs; `None` if all can."""
        return next(filter(None, (pool.uncapturable for pool in self.pools)), None)

    @property
    def loaded(self) -> Any:
        raise EngineError(_SEVERAL)

    @property
    def context(self) -> Any:
        raise EngineError(_SEVERAL)


_SEVERAL = (
    "This module holds several engines, each for some of the sizes. model_trt.built.each() gives them one by one, for "
    "TRTModule(engine)."
)


def load(engine: Engine, index: int | None) -> ContextPool | VariantPools:
    """The execution contexts of an engine on a GPU, the current one if not given."""
    return VariantPools(engine, index) if engine.variants else ContextPool(LoadedEngine(engine, index))


def _describe(part: Interface) -> str:
    inputs = ", ".join(f"{spec.name}: {spec.describe()}" for spec in part.inputs)
    return inputs + "".join(f", where {text}" for _, text in part.constraints)
