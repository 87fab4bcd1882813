"""The values of one trace: which of them the graph computes, and which node computes each.

`memory/` follows writes: `storages.py` through the memory that fake tensors share, `written_constants.py` where traced
values are written to real tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, UnsupportedOperatorException
from torch.overrides import TorchFunctionMode

from torch2rt.callables import Target, qualified_name
from torch2rt.errors import TraceError
from torch2rt.passes.partitioning.effects import draws
from torch2rt.registry import Call
from torch2rt.sizes import is_symbolic
from torch2rt.tracing.calls.generators import with_generator
from torch2rt.tracing.computed_masks import is_selected
from torch2rt.tracing.memory.storages import Storages
from torch2rt.tracing.memory.tensors import tensor_versions
from torch2rt.tracing.memory.written_constants import WrittenConstants
from torch2rt.tracing.patches.fake_mode import with_numbers
from torch2rt.tracing.recorder import Recorder


class UnseenWriteError(TraceError):
    """A call writes to its arguments, and neither its name nor its schema says so."""


class Values:
    """The values of one trace and their nodes.

    `repeat` makes a call again, so that it is recorded like the module's own calls.
    """

    def __init__(self, recorder: Recorder, repeat: Callable[[Call], Any]) -> None:
        self.recorder = recorder
        self.storages = Storages(recorder)
        self.written_constants = WrittenConstants(recorder, self.storages, repeat)

    def is_traced(self, value: Any) -> bool:
        """Whether a fake tensor of this run, or a symbolic size, is anywhere in a call's arguments."""
        if is_selected(value):
            return True
        if isinstance(value, torch.Tensor):
            return isinstance(value, FakeTensor) or self.written_constants.is_written(value)
        if isinstance(value, (tuple, list)):
            return any(self.is_traced(v) for v in value)
        if isinstance(value, dict):
            return any(self.is_traced(v) for v in value.values())
        if isinstance(value, slice):
            return (
                is_symbolic(value.start)
                or is_symbolic(value.stop)
                or is_symbolic(value.step)
                or any(isinstance(v, torch.Tensor) and self.is_traced(v) for v in (value.start, value.stop, value.step))
            )
        return is_symbolic(value)

    # Nodes -----------------------------------------------------------------------------------------------------------

    def node(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """The node that holds a tensor's value now, or `None` for a tensor of the outside world."""
        tensor = self.written_constants.replaced(tensor)
        node = self.storages.node(tensor)
        if node is None and not isinstance(tensor, FakeTensor) and self.written_constants.is_written(tensor):
            raise TraceError(
                f"{self.recorder.location.here()}: a view is used whose base was written to from traced values. "
                "Make the view after the write, or write to a clone."
            )
        return node

    def argument(self, value: Any) -> Any:
        """A call's argument as the graph holds it."""
        return self.recorder.argument(value, self._node_or_constant)

    def _node_or_constant(self, tensor: torch.Tensor) -> torch.fx.Node:
        node = self.node(tensor)
        return self.recorder.constant(tensor) if node is None else node

    def bind(self, out: Any, node: torch.fx.Node, call: Call, path: tuple[int, ...] = ()) -> None:
        """Remember which node computes each tensor of a call's result."""
        if isinstance(out, torch.Tensor):
            self.storages.bind(out, node, call, path)
            self.recorder.note_unbacked(out, node)
        elif isinstance(out, (tuple, list)):
            for index, item in enumerate(out):
                if isinstance(item, (torch.Tensor, tuple, list)):
                    part = self.recorder.node(operator.getitem, (node, index), {}, item, like=node)
                    self.bind(item, part, call, (*path, index))

    # New values ------------------------------------------------------------------------------------------------------

    def operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new fake tensor of the same type that only stands for a value, as the operand of a subgraph."""
        fake, node = self.recorder.operand(tensor)
        self.storages.bind(fake, node)
        return fake

    def record(self, func: Target, args: Any, kwargs: Any) -> Any:
        """Run one call on the fake tensors and append it to the graph."""
        recorder, mode = self.recorder, self.recorder.fake_mode
        target, named, generator = func, kwargs, None
        if recorder.generators is not None:
            target, named, generator = with_generator(func, kwargs)
        node_args, node_kwargs = self.argument(args), self.argument(named)
        with recorder.fake_tensors(), mode.reading() as numbers:
            fake_args, fake_kwargs = self._fake(args), self._fake(kwargs)
            fakes = fake_args, fake_kwargs
            before = tensor_versions(fakes)
            fake_func = func
            if generator is not None:  # fake kernels take none
                fake_func = func.overloadpacket if isinstance(func, torch._ops.OpOverload) else func
                fake_kwargs = {k: v for k, v in fake_kwargs.items() if k != "generator"}
            try:
                out = fake_func(*fake_args, **fake_kwargs)
            except (NotImplementedError, UnsupportedOperatorException):
                # cuDNN's kernels have no fake ones; torch's others give the same shapes
                with torch.backends.cudnn.flags(enabled=False):
                    out = fake_func(*fake_args, **fake_kwargs)
        if before != tensor_versions(fakes):
            raise UnseenWriteError(
                f"{recorder.location.here()}: {qualified_name(func)} writes to one of its arguments in an unknown way."
            )
        if numbers:
            node_args, node_kwargs = self.argument(with_numbers((args, named), numbers))
        node = recorder.node(target, tuple(node_args), node_kwargs, out)
        if recorder.generators is not None and draws(node):
            recorder.generators.note_draw(node, generator)
        self.bind(out, node, (func, args, kwargs))
        return out

    def _fake(self, value: Any) -> Any:
        """A call's argument with fake tensors for weights: calls of fake tensors alone torch's fake mode remembers.

        It makes the same fake tensors itself, but later. A 0-d tensor stays, as torch may take it for a number.
        """
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.dim() and value.is_floating_point():
            return self.recorder.fake_mode.from_tensor(value, static_shapes=True)
        if type(value) in (tuple, list):
            return type(value)(map(self._fake, value))
        return {k: self._fake(v) for k, v in value.items()} if type(value) is dict else value


class RecordingMode(TorchFunctionMode):
    """A torch function mode that records calls: functions that run below it find the values of the trace here."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values
