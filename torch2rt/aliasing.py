"""Which node holds the value of a tensor, also after writes: to it, to what it is a view of, or to its other views.

Tensors that share memory share a `_Storage`. The first of them that the trace meets is the root, and its node holds the
current content; a view remembers the call that made it. A write to the root or to a view replaces the root's node and
ages every other view. A view is brought up to date, by replaying the ATen view operators that made it, when it is next
used. So a stale value cannot reach the graph: what can be neither replayed nor written back is refused.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torch2rt.errors import TraceError
from torch2rt.registry import Target, qualified_name

if TYPE_CHECKING:
    from torch2rt.tracing import Tracer

Call = tuple[Target, Any, Any]


@dataclasses.dataclass
class _Storage:
    """Memory that several tensors may look at."""

    root: torch.Tensor
    node: torch.fx.Node
    version: int = 0


@dataclasses.dataclass
class _Binding:
    """The node of a tensor, how old it is, and for a view the call that made it."""

    tensor: torch.Tensor
    node: torch.fx.Node
    version: int
    call: Call | None
    path: tuple[int, ...]


@dataclasses.dataclass
class _View:
    """One ATen view operator: its other arguments, what it looked at, and which of its results it is."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    base: torch.Tensor
    index: int | None


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Storages:
    """The values of all tensors of one trace."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self._storages: dict[int, _Storage] = {}
        self._bindings: dict[int, _Binding] = {}
        self._shadows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def bind(
        self, tensor: torch.Tensor, node: torch.fx.Node, call: Call | None = None, path: tuple[int, ...] = ()
    ) -> None:
        """Remember the node of a tensor that a call has just returned."""
        if id(tensor) in self._bindings or not isinstance(tensor, FakeTensor):
            return
        storage = self._storages.setdefault(_key(tensor), _Storage(tensor, node))
        self._bindings[id(tensor)] = _Binding(tensor, node, storage.version, call, path)

    def adopt(self, out: Any, args: Any, func: Target) -> None:
        """Take in the results of a call that made no ATen operator torch2rt could see, such as `x.data`."""
        for tensor in _tensors(out):
            if not isinstance(tensor, FakeTensor) or id(tensor) in self._bindings:
                continue
            same = next((t for t in _tensors(args) if isinstance(t, FakeTensor) and _same_memory(t, tensor)), None)
            if same is None:
                raise TraceError(
                    f"{self.tracer.places.here()}: {qualified_name(func)} returned a tensor that torch2rt could not follow."
                )
            self.bind(tensor, self.node(same), (torch.ops.aten.alias.default, (same,), {}))  # type: ignore[arg-type]

    def node(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """The node that holds a tensor's value now, or `None` for a tensor of the outside world."""
        if id(tensor) in self._shadows:
            tensor = self._shadows[id(tensor)][1]
        binding = self._bindings.get(id(tensor))
        if binding is None:
            base = tensor._base if not isinstance(tensor, FakeTensor) else None
            if base is not None and id(base) in self._shadows:
                raise TraceError(
                    f"{self.tracer.places.here()}: a view is used whose base was written to from traced values. "
                    "Make the view after the write, or write to a clone."
                )
            return None
        storage = self._storages[_key(tensor)]
        if binding.version != storage.version:
            binding.node = storage.node if tensor is storage.root else self._replay(binding, storage)
            binding.version = storage.version
        return binding.node

    def write(self, tensor: torch.Tensor, node: torch.fx.Node) -> None:
        """A tensor's memory now holds what `node` computes."""
        storage, binding = self._storages[_key(tensor)], self._bindings[id(tensor)]
        if tensor is storage.root:
            storage.node = node
        else:
            storage.node = self._write_back(binding, node, storage)
        storage.version += 1
        binding.node, binding.version = node, storage.version

    def shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake tensor to write to; a real one gets a stand-in that takes its place from here on."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._shadows:
            tracer = self.tracer
            if (name := tracer._attribute_names.get(id(tensor))) is not None:
                raise TraceError(
                    f"{tracer.places.here()}: the module writes to its parameter or buffer '{name}' from traced values. "
                    "An engine has no state: return the new value instead."
                )
            if tensor._base is not None:
                raise TraceError(
                    f"{tracer.places.here()}: a view of a constant tensor is written to from traced values. "
                    "Write to the tensor itself, or to a clone."
                )
            fake = tracer.fake_mode.from_tensor(tensor)
            self.bind(fake, tracer.attribute(tensor))
            self._shadows[id(tensor)] = (tensor, fake)
        return self._shadows[id(tensor)][1]

    def is_shadowed(self, tensor: torch.Tensor) -> bool:
        """Whether traced values have been written to a real tensor or to its base."""
        return id(tensor) in self._shadows or (tensor._base is not None and id(tensor._base) in self._shadows)

    def with_shadows(self, value: Any) -> Any:
        """Arguments with every real tensor that was written to replaced by its stand-in."""
        if not self._shadows:
            return value
        swap = lambda t: self._shadows[id(t)][1] if id(t) in self._shadows else t  # noqa: E731
        return tree_map_only(torch.Tensor, swap, value)

    def versions(self, value: Any) -> list[int]:
        """torch's own write counters of the traced tensors in a call's arguments."""
        return [t._version for t in _tensors(value) if isinstance(t, FakeTensor)]

    def check_inputs(self, fakes: list[torch.Tensor], names: list[str]) -> None:
        """Refuse a module that has written to its inputs."""
        for fake, name in zip(fakes, names, strict=True):
            if self._storages[_key(fake)].version:
                raise TraceError(
                    f"The module writes to its input '{name}' in place, which an engine would not do to the caller's tensor. "
                    "Clone the input first."
                )

    # Views -----------------------------------------------------------------------------------------------------------

    def _chain(self, binding: _Binding, storage: _Storage) -> list[_View]:
        """The ATen view operators that lead from the storage's root to a view."""
        views: list[_View] = []
        tensor = binding.tensor
        while tensor is not storage.root:
            made = self._bindings[id(tensor)]
            assert made.call is not None
            step = _atens(self.tracer, made.call, made.path, tensor)
            if not step:
                raise TraceError(
                    f"{self.tracer.places.here()}: a tensor is used after memory it shares was written to, and how "
                    f"{qualified_name(made.call[0])} made it from that memory is not known. Clone it before the write."
                )
            views = [*step, *views]
            tensor = step[0].base
        return views

    def _replay(self, binding: _Binding, storage: _Storage) -> torch.fx.Node:
        node = storage.node
        for view in self._chain(binding, storage):
            node = self._apply(view, node)
        return node

    def _apply(self, view: _View, node: torch.fx.Node) -> torch.fx.Node:
        with self.tracer.decisions.inside(), self.tracer.fake_mode:
            out = view.func(view.base, *view.args, **view.kwargs)
        new = self.tracer._node(view.func, (node, *self.tracer._argument(view.args)), view.kwargs, out)
        if view.index is None:
            return new
        import operator

        return self.tracer._node(operator.getitem, (new, view.index), {}, out[view.index], like=new)

    def _write_back(self, binding: _Binding, node: torch.fx.Node, storage: _Storage) -> torch.fx.Node:
        views = self._chain(binding, storage)
        contents = [storage.node]
        for view in views[:-1]:
            contents.append(self._apply(view, contents[-1]))
        for view, content in zip(reversed(views), reversed(contents), strict=True):
            inverse = _INVERSES.get(view.func)
            if inverse is None:
                raise TraceError(
                    f"{self.tracer.places.here()}: writing through a {qualified_name(view.func)} view is not supported. "
                    "Write to a clone and put the parts together."
                )
            target, args = inverse(view)
            with self.tracer.decisions.inside(), self.tracer.fake_mode:
                new_args = (content, node, *args) if target in _SCATTERS else (node, *args)
                values = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in new_args]
                out = target(*values)
            node = self.tracer._node(target, tuple(self.tracer._argument(a) for a in new_args), {}, out)
        return node


class _ViewRecorder(TorchDispatchMode):
    """Writes down the view operators that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[torch.Tensor, _View]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], torch.Tensor):
            for index, tensor in enumerate(out if isinstance(out, (tuple, list)) else [out]):
                if isinstance(tensor, torch.Tensor) and tensor is not args[0] and _key(tensor) == _key(args[0]):
                    view = _View(func, args[1:], kwargs or {}, args[0], index if isinstance(out, (tuple, list)) else None)
                    self.made[id(tensor)] = (tensor, view)
        return out


def _atens(tracer: Tracer, call: Call, path: tuple[int, ...], tensor: torch.Tensor) -> list[_View]:
    """How a call made a view, as ATen view operators from one of the call's arguments on."""
    func, args, kwargs = call
    recorder = _ViewRecorder()
    with tracer.decisions.inside(), tracer.fake_mode, recorder:
        out = func(*args, **kwargs)
        for index in path:
            out = out[index]
    views: list[_View] = []
    current = out
    bound = {id(t) for t in _tensors((args, kwargs))}
    while id(current) not in bound:
        if id(current) not in recorder.made:
            return []
        view = recorder.made[id(current)][1]
        views.insert(0, view)
        current = view.base
    return views


def _shape(tensor: torch.Tensor) -> list[Any]:
    return list(tensor.shape)


def _permute_back(view: _View) -> tuple[Any, tuple[Any, ...]]:
    dims = [d % len(view.args[0]) for d in view.args[0]]
    return torch.ops.aten.permute.default, ([dims.index(i) for i in range(len(dims))],)


def _split_back(view: _View) -> tuple[Any, tuple[Any, ...]]:
    size, dim = view.args[0], view.args[1] if len(view.args) > 1 else 0
    assert view.index is not None
    if isinstance(size, (tuple, list)):
        start, length = sum(size[: view.index]), size[view.index]
    else:
        start, length = size * view.index, size
    end = torch.sym_min(start + length, view.base.shape[dim])
    return torch.ops.aten.slice_scatter.default, (dim, start, end, 1)


def _reshape_back(view: _View) -> tuple[Any, tuple[Any, ...]]:
    return torch.ops.aten.reshape.default, (_shape(view.base),)


_ATEN = torch.ops.aten
_SCATTERS = {_ATEN.select_scatter.default, _ATEN.slice_scatter.default, _ATEN.diagonal_scatter.default}
_INVERSES: dict[Any, Callable[[_View], tuple[Any, tuple[Any, ...]]]] = {
    _ATEN.select.int: lambda v: (_ATEN.select_scatter.default, v.args),
    _ATEN.slice.Tensor: lambda v: (_ATEN.slice_scatter.default, v.args),
    _ATEN.diagonal.default: lambda v: (_ATEN.diagonal_scatter.default, v.args),
    _ATEN.unbind.int: lambda v: (_ATEN.select_scatter.default, (v.args[0] if v.args else 0, v.index)),
    _ATEN.split.Tensor: _split_back,
    _ATEN.split_with_sizes.default: _split_back,
    _ATEN.transpose.int: lambda v: (_ATEN.transpose.int, v.args),
    _ATEN.t.default: lambda v: (_ATEN.t.default, ()),
    _ATEN.permute.default: _permute_back,
    **dict.fromkeys(
        [_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default, _ATEN._reshape_alias.default,
         _ATEN.unsqueeze.default, _ATEN.squeeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.dims, _ATEN.alias.default,
         _ATEN.detach.default],
        _reshape_back,
    ),
}  # fmt: skip


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    return []


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return _key(a) == _key(b) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
