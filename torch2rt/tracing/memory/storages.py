"""Which node holds the value of a tensor, also after writes: to it, to what it is a view of, or to its other views.

Tensors that share memory share a `_Storage`. The first of them that the trace meets is the root, and its node holds the
current content; a view remembers the call that made it. A write to the root or to a view replaces the root's node and
ages every other view. A view is brought up to date, by replaying the ATen view operators that made it, when it is next
used. So a stale value cannot reach the graph: what can be neither replayed nor written back is refused.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_map

from torch2rt.callables import Target, qualified_name
from torch2rt.errors import TraceError
from torch2rt.registry import Call
from torch2rt.sizes import evaluate, expression, is_symbolic
from torch2rt.tracing.memory.tensors import is_same_view, memory_of, tensors_in
from torch2rt.tracing.memory.views import INVERSES, SCATTERS, View, views_of
from torch2rt.tracing.recorder import Recorder


@dataclasses.dataclass
class _Storage:
    """Memory that several tensors may look at."""

    root: torch.Tensor
    node: torch.fx.Node
    version: int = 0
    same_at_one: list[int] = dataclasses.field(default_factory=list)  # storages it is one with where sizes are 1
    doubtful: str = ""  # the place where such a one was written to


@dataclasses.dataclass
class _Binding:
    """The node of a tensor, how old it is, and for a view the call that made it."""

    tensor: torch.Tensor
    node: torch.fx.Node
    version: int
    call: Call | None
    path: tuple[int, ...]
    memory: int


class Storages:
    """The nodes of all fake tensors of one trace."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._storages: dict[int, _Storage] = {}
        self._bindings: dict[int, _Binding] = {}
        self._writable: set[int] | None = None  # the memory that may be written to, while that is limited
        self._enclosed: set[torch.fx.Node] = set()  # nodes that have moved into a graph of their own

    def bind(
        self, tensor: torch.Tensor, node: torch.fx.Node, call: Call | None = None, path: tuple[int, ...] = ()
    ) -> None:
        """Remember the node of a tensor that a call has just returned."""
        if id(tensor) in self._bindings or not isinstance(tensor, FakeTensor):
            return
        if memory_of(tensor) not in self._storages:
            self.allow_writes(tensor)
            self._storages[memory_of(tensor)] = _Storage(tensor, node)
            if call is not None and _copies_if_needed(call) and self._shared_at_one(call):
                pair = (memory_of(tensor), memory_of(call[1][0]))
                for one, other in (pair, pair[::-1]):
                    self._storages[one].same_at_one.append(other)
        storage = self._storages[memory_of(tensor)]
        self._bindings[id(tensor)] = _Binding(tensor, node, storage.version, call, path, memory_of(tensor))

    def adopt(self, out: Any, args: Any, func: Target) -> None:
        """Take in the results of a call that made no ATen operator torch2rt could see, such as `x.data`."""
        for tensor in tensors_in(out):
            if not isinstance(tensor, FakeTensor) or id(tensor) in self._bindings:
                continue
            same = next((t for t in tensors_in(args) if isinstance(t, FakeTensor) and is_same_view(t, tensor)), None)
            if same is None:
                raise TraceError(
                    f"{self.recorder.location.here()}: {qualified_name(func)} returned a tensor that "
                    "torch2rt could not follow."
                )
            self.bind(tensor, self.node(same), (torch.ops.aten.alias.default, (same,), {}))  # type: ignore[arg-type]

    def last_node(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """The node that a tensor was last known to come from, perhaps before writes to other views of its memory."""
        binding = self._bindings.get(id(tensor))
        return None if binding is None else binding.node

    def node(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """The node that holds a fake tensor's value now, or `None` for a tensor of the outside world."""
        binding = self._bindings.get(id(tensor))
        if binding is None:
            return None
        if binding.memory != memory_of(tensor):
            raise TraceError(
                f"{self.recorder.location.here()}: a tensor was given other memory by set_. Make a new tensor."
            )
        storage = self._storages[memory_of(tensor)]
        if storage.doubtful:
            raise TraceError(
                f"{self.recorder.location.here()}: whether this tensor was written to at {storage.doubtful} depends on "
                "a dynamic size: a reshape or contiguous() copies, except where the size is 1. Put a clone() after it."
            )
        if storage.node in self._enclosed:
            raise TraceError(
                f"{self.recorder.location.here()}: a tensor that was made in the body of a loop is used outside of it. "
                "Return it from the body."
            )
        if binding.version != storage.version:
            binding.node = storage.node if tensor is storage.root else self._replay(binding, storage)
            binding.version = storage.version
        return binding.node

    @contextmanager
    def only_new_writable(self) -> Iterator[None]:
        """Within the context, refuse writes to tensors that were not made there."""
        before, self._writable = self._writable, set()
        try:
            yield
        finally:
            self._writable = before

    @property
    def is_limited(self) -> bool:
        return self._writable is not None

    def allow_writes(self, value: Any) -> None:
        """These tensors are new, and may be written to."""
        if self._writable is not None:
            self._writable.update(map(memory_of, tensors_in(value)))

    def check_writable(self, tensor: torch.Tensor) -> None:
        if self._writable is not None and memory_of(tensor) not in self._writable:
            raise TraceError(
                f"{self.recorder.location.here()}: a branch, or the body of a loop, writes to a tensor that it did not "
                "make. Let it return the new value."
            )

    def forget(self, nodes: set[torch.fx.Node]) -> None:
        """These nodes have moved into a graph of their own, so no other may refer to them."""
        self._enclosed |= nodes
        for binding in self._bindings.values():
            if binding.node in nodes:
                binding.version = -1  # replayed, unless its memory is from there too

    def write(self, tensor: torch.Tensor, node: torch.fx.Node) -> None:
        """A tensor's memory now holds what `node` computes."""
        storage, binding = self._storages[memory_of(tensor)], self._bindings[id(tensor)]
        if tensor is storage.root:
            storage.node = node
        else:
            storage.node = self._write_back(binding, node, storage)
        storage.version += 1
        binding.node, binding.version = node, storage.version
        for other in storage.same_at_one:
            self._storages[other].doubtful = self.recorder.location.here()

    def reshape(self, tensor: torch.Tensor, run: Callable[[], Any], call: Callable[[torch.Tensor], Call]) -> None:
        """Follow a call that changes a tensor's shape in place (`x.t_()`): an alias takes the place of what it was."""
        self.check_writable(tensor)
        recorder, binding, storage = self.recorder, self._bindings[id(tensor)], self._storages[memory_of(tensor)]
        if binding.node.op == "placeholder":
            raise TraceError(f"{recorder.location.here()}: the module changes the shape of its input in place.")
        views = [b for b in self._bindings.values() if b.call and memory_of(b.tensor) == memory_of(tensor)]
        if any(t is tensor for b in views for t in tensors_in(b.call)):
            raise TraceError(
                f"{recorder.location.here()}: the module changes the shape of a tensor that has views in place. "
                "Use the call without the underscore."
            )
        node = self.node(tensor)
        with recorder.fake_tensors():
            old = torch.ops.aten.alias.default(tensor)
        self._bindings[id(old)] = dataclasses.replace(self._bindings[id(tensor)], tensor=old)
        storage.root = old if storage.root is tensor else storage.root
        for other in recorder.graph.nodes:
            other.meta["val"] = _swapped(other.meta.get("val"), tensor, old)
        target, args, kwargs = call(old)
        with recorder.fake_tensors():
            run()
        node = recorder.node(target, (node, *recorder.argument(args[1:])), recorder.argument(kwargs), tensor)
        self._bindings[id(tensor)] = _Binding(
            tensor, node, storage.version, (target, args, kwargs), (), memory_of(tensor)
        )

    def check_inputs(self, fakes: list[torch.Tensor], names: list[str]) -> None:
        """Refuse a module that has written to its inputs."""
        for fake, name in zip(fakes, names, strict=True):
            if self._storages[memory_of(fake)].version:
                raise TraceError(
                    f"The module writes to its input '{name}' in place, which an engine would not do to "
                    "the caller's tensor. Clone the input first."
                )

    def _shared_at_one(self, call: Call) -> bool:
        """Whether a call that copies for larger sizes returns its argument's memory where dynamic sizes are 1."""
        sizes = {symbol: 1 if dim.min <= 1 else dim.max for symbol, dim in self.recorder.symbols.items()}
        if 1 not in sizes.values():
            return False
        at_one = lambda v: int(evaluate(expression(v), sizes)) if is_symbolic(v) else v  # noqa: E731

        def small(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return at_one(value)
            shape, stride = ([at_one(v) for v in values] for values in (value.shape, value.stride()))
            return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")

        func, args, kwargs = call
        if any(
            not expression(s).free_symbols <= sizes.keys()
            for t in tensors_in((args, kwargs))
            for s in t.shape
            if is_symbolic(s)
        ):
            return True  # as sizes that depend on values may be 1
        with unset_fake_temporarily():
            try:
                args, kwargs = tree_map(small, (args, kwargs))
            except ZeroDivisionError:  # outside of the region that this trace is right for
                return True
            try:
                return memory_of(func(*args, **kwargs)) == memory_of(args[0])
            except RuntimeError:  # it cannot be called with such sizes, which is a claim of its own
                return False

    # Views -----------------------------------------------------------------------------------------------------------

    def _views_from_root(self, binding: _Binding, storage: _Storage) -> list[View]:
        """The ATen view operators that lead from the storage's root to a view."""
        views: list[View] = []
        tensor = binding.tensor
        while tensor is not storage.root:
            made = self._bindings[id(tensor)]
            assert made.call is not None
            made_by = views_of(made.call, made.path, self.recorder)
            if not made_by:
                raise TraceError(
                    f"{self.recorder.location.here()}: a tensor is used after memory it shares was written to, and how "
                    f"{qualified_name(made.call[0])} made it from that memory is not known. Clone it before the write."
                )
            views = [*made_by, *views]
            tensor = made_by[0].base
        return views

    def _replay(self, binding: _Binding, storage: _Storage) -> torch.fx.Node:
        """Record again how a view was made, from the storage's current content."""
        node = storage.node
        for view in self._views_from_root(binding, storage):
            node = self._apply(view, node)
        return node

    def _apply(self, view: View, node: torch.fx.Node) -> torch.fx.Node:
        """Record one view operator on the content that `node` computes."""
        with self.recorder.fake_tensors():
            out = view.func(view.base, *view.args)
        new = self.recorder.node(view.func, (node, *self.recorder.argument(view.args)), {}, out)
        if view.index is None:
            return new
        return self.recorder.node(operator.getitem, (new, view.index), {}, out[view.index], like=new)

    def _write_back(self, binding: _Binding, node: torch.fx.Node, storage: _Storage) -> torch.fx.Node:
        """Record what a storage holds after a write of `node` to a view of it."""
        views = self._views_from_root(binding, storage)
        contents = [storage.node]
        for view in views[:-1]:
            contents.append(self._apply(view, contents[-1]))
        for view, content in zip(reversed(views), reversed(contents), strict=True):
            inverse = INVERSES.get(view.func)
            if inverse is None:
                raise TraceError(
                    f"{self.recorder.location.here()}: writing through a {qualified_name(view.func)} view is not "
                    "supported. Write to a clone and put the parts together."
                )
            target, args = inverse(view)
            with self.recorder.fake_tensors():
                new_args = (content, node, *args) if target in SCATTERS else (node, *args)
                values = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in new_args]
                out = target(*values)
            node = self.recorder.node(target, tuple(self.recorder.argument(a) for a in new_args), {}, out)
        return node


def _copies_if_needed(call: Call) -> bool:
    """Whether a call returns a view or a copy, depending on strides."""
    name = getattr(call[0], "__name__", "").split(".")[0]
    return name in ("reshape", "reshape_as", "flatten", "ravel", "contiguous") and isinstance(call[1][0], FakeTensor)


def _swapped(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(value, (tuple, list)) and any(v is old for v in value):
        return [new if v is old else v for v in value]
    return new if value is old else value
