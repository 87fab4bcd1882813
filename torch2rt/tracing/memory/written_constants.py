"""Real tensors that traced values are written to, as in `table = torch.zeros(3); table[0] = x.sum()`.

From the first such write on, a fake tensor takes the place of the real one, and a view of it that of each real view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from torch2rt.errors import TraceError
from torch2rt.registry import Call
from torch2rt.tracing.memory.storages import Storages
from torch2rt.tracing.memory.tensors import memory_of, tensors_in
from torch2rt.tracing.recorder import Recorder


class WrittenConstants:
    """The real tensors of one trace that were written to, each with the fake tensor that stands for it.

    `repeat` makes a call again, so that it is recorded like the module's own calls.
    """

    def __init__(self, recorder: Recorder, storages: Storages, repeat: Callable[[Call], Any]) -> None:
        self.recorder, self.storages, self.repeat = recorder, storages, repeat
        self._stand_ins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._memory: set[int] = set()
        self._views: dict[int, tuple[torch.Tensor, Call, tuple[int, ...]]] = {}  # of real tensors

    def writable(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake tensor to write to: for a real tensor, the one that stands for it from here on."""
        self.storages.check_writable(tensor)
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._stand_ins:
            recorder = self.recorder
            if (name := recorder.constants.kept_name(tensor)) is not None:
                raise TraceError(
                    f"{recorder.location.here()}: the module writes to its own '{name}' from traced values. An engine "
                    'has no state: return the new value instead, or convert with state="write".'
                )
            if id(tensor) in self._views:
                return self._writable_view(tensor)
            if tensor._base is not None or memory_of(tensor) in self._memory:
                raise TraceError(
                    f"{recorder.location.here()}: a view of a constant tensor is written to from traced values. "
                    "Write to the tensor itself, or to a clone."
                )
            fake = recorder.fake_mode.from_tensor(tensor, static_shapes=True)
            self.storages.allow_writes(fake)
            self.storages.bind(fake, recorder.constant(tensor))
            self._stand_ins[id(tensor)] = (tensor, fake)
            self._memory.add(memory_of(tensor))
        return self._stand_ins[id(tensor)][1]

    def note_views(self, out: Any, call: Call, path: tuple[int, ...] = ()) -> None:
        """Remember how a call without traced arguments made views, should their memory be written to later."""
        if isinstance(out, torch.Tensor):
            arguments = tensors_in(call[1:])
            if (
                not isinstance(out, FakeTensor)
                and id(out) not in self._views
                and all(t is not out for t in arguments)
                and any(memory_of(t) == memory_of(out) for t in arguments)
            ):
                self._views[id(out)] = (out, call, path)
        elif isinstance(out, (tuple, list)):
            for index, item in enumerate(out):
                self.note_views(item, call, (*path, index))

    def _writable_view(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands for a real view: the same view of what stands for its base."""
        _, call, path = self._views[id(tensor)]
        for base in tensors_in(call[1:]):
            if memory_of(base) == memory_of(tensor):
                self.writable(base)
        out = self.repeat(call)
        for index in path:
            out = out[index]
        self._stand_ins[id(tensor)] = (tensor, out)
        return out

    def is_written(self, tensor: torch.Tensor) -> bool:
        """Whether traced values have been written to a real tensor or to one that shares its memory."""
        return bool(self._stand_ins) and memory_of(tensor) in self._memory

    def replaced(self, value: Any) -> Any:
        """Arguments with the fake tensor in the place of each real one that was written to."""
        if not self._stand_ins:
            return value

        def swap(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in self._stand_ins:
                return self._stand_ins[id(tensor)][1]
            if id(tensor) in self._views and self.is_written(tensor):
                return self._writable_view(tensor)
            return tensor

        return tree_map_only(torch.Tensor, swap, value)
