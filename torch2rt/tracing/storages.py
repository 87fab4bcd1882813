"""Which node holds the value of a tensor, also after writes: to it, to what it is a view of, or to its other views.

Tensors that share memory share a `_Storage`. The first of them that the trace meets is the root, and its node holds the
current content; a view remembers the call that made it. A write to the root or to a view replaces the root's node and
ages every other view. A view is brought up to date, by replaying the ATen view operators that made it, when it is next
used. So a stale value cannot reach the graph: what can be neither replayed nor written back is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from torch2rt.errors import TraceError
from torch2rt.registry import Call, Target, qualified_name
from torch2rt.sizes import evaluate, expression, is_symbolic

if TYPE_CHECKING:
    from torch2rt.tracing.tracer import Tracer


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


@dataclasses.dataclass
class _View:
    """One ATen view operator: its other arguments, what it looked at, and which of its results it is."""

    func: Any
    args: tuple[Any, ...]
    base: torch.Tensor
    index: int | None
    parts: Sequence[torch.Tensor] = ()


def _key(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse tensors and those inside of torch.vmap have no memory to show
        return -id(tensor)


class Storages:
    """The values of all tensors of one trace."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self._storages: dict[int, _Storage] = {}
        self._bindings: dict[int, _Binding] = {}
        self._shadows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._shadowed_memory: set[int] = set()
        self._constant_views: dict[int, tuple[torch.Tensor, Call, tuple[int, ...]]] = {}
        self.tainted: dict[int, tuple[torch.Tensor, str]] = {}  # memory that must not reach the graph, and why
        self._made: set[int] | None = None  # the memory that may be written to, while that is limited
        self._enclosed: set[torch.fx.Node] = set()  # nodes that have moved into a graph of their own

    def bind(
        self, tensor: torch.Tensor, node: torch.fx.Node, call: Call | None = None, path: tuple[int, ...] = ()
    ) -> None:
        """Remember the node of a tensor that a call has just returned."""
        if id(tensor) in self._bindings or not isinstance(tensor, FakeTensor):
            return
        if _key(tensor) not in self._storages:
            self.made(tensor)
            self._storages[_key(tensor)] = _Storage(tensor, node)
            if call is not None and _copies_if_needed(call) and self._shared_at_one(call):
                pair = (_key(tensor), _key(call[1][0]))
                for one, other in (pair, pair[::-1]):
                    self._storages[one].same_at_one.append(other)
        storage = self._storages[_key(tensor)]
        self._bindings[id(tensor)] = _Binding(tensor, node, storage.version, call, path, _key(tensor))

    def adopt(self, out: Any, args: Any, func: Target) -> None:
        """Take in the results of a call that made no ATen operator torch2rt could see, such as `x.data`."""
        for tensor in _tensors(out):
            if not isinstance(tensor, FakeTensor) or id(tensor) in self._bindings:
                continue
            same = next((t for t in _tensors(args) if isinstance(t, FakeTensor) and _same_memory(t, tensor)), None)
            if same is None:
                raise TraceError(
                    f"{self.tracer.places.here()}: {qualified_name(func)} returned a tensor that "
                    "torch2rt could not follow."
                )
            self.bind(tensor, self.node(same), (torch.ops.aten.alias.default, (same,), {}))  # type: ignore[arg-type]

    def last_node(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """The node that a tensor was last known to come from, perhaps before writes to other views of its memory."""
        binding = self._bindings.get(id(tensor))
        return None if binding is None else binding.node

    def node(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """The node that holds a tensor's value now, or `None` for a tensor of the outside world."""
        tensor = self.with_shadows(tensor)
        binding = self._bindings.get(id(tensor))
        if binding is None:
            if not isinstance(tensor, FakeTensor) and self.is_shadowed(tensor):
                raise TraceError(
                    f"{self.tracer.places.here()}: a view is used whose base was written to from traced values. "
                    "Make the view after the write, or write to a clone."
                )
            return None
        if binding.memory != _key(tensor):
            raise TraceError(
                f"{self.tracer.places.here()}: a tensor was given other memory by set_. Make a new tensor."
            )
        storage = self._storages[_key(tensor)]
        if storage.doubtful:
            raise TraceError(
                f"{self.tracer.places.here()}: whether this tensor was written to at {storage.doubtful} depends on a "
                "dynamic size: a reshape or contiguous() copies, except where the size is 1. Put a clone() after it."
            )
        if storage.node in self._enclosed:
            raise TraceError(
                f"{self.tracer.places.here()}: a tensor that was made in the body of a loop is used outside of it. "
                "Return it from the body."
            )
        if binding.version != storage.version:
            binding.node = storage.node if tensor is storage.root else self._replay(binding, storage)
            binding.version = storage.version
        return binding.node

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the context, refuse writes to tensors that were not made there."""
        before, self._made = self._made, set()
        try:
            yield
        finally:
            self._made = before

    @property
    def is_frozen(self) -> bool:
        return self._made is not None

    def made(self, value: Any) -> None:
        """These tensors are new, and may be written to."""
        if self._made is not None:
            self._made.update(map(_key, _tensors(value)))

    def taint(self, value: Any, reason: str) -> None:
        """These tensors, and what shares their memory, must not become constants of the graph."""
        self.tainted.update((_key(tensor), (tensor, reason)) for tensor in _tensors(value))

    def taint_of(self, value: Any) -> str:
        return self.tainted.get(_key(value), (None, ""))[1] if isinstance(value, torch.Tensor) else ""

    def check_writable(self, tensor: torch.Tensor) -> None:
        if self._made is not None and _key(tensor) not in self._made:
            raise TraceError(
                f"{self.tracer.places.here()}: a branch, or the body of a loop, writes to a tensor that it did not "
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
        storage, binding = self._storages[_key(tensor)], self._bindings[id(tensor)]
        if tensor is storage.root:
            storage.node = node
        else:
            storage.node = self._write_back(binding, node, storage)
        storage.version += 1
        binding.node, binding.version = node, storage.version
        for other in storage.same_at_one:
            self._storages[other].doubtful = self.tracer.places.here()

    def reshape(self, tensor: torch.Tensor, run: Callable[[], Any], call: Callable[[torch.Tensor], Call]) -> None:
        """Follow a call that changes a tensor's shape in place (`x.t_()`): an alias takes the place of what it was."""
        self.check_writable(tensor)
        tracer, binding, storage = self.tracer, self._bindings[id(tensor)], self._storages[_key(tensor)]
        if binding.node.op == "placeholder":
            raise TraceError(f"{tracer.places.here()}: the module changes the shape of its input in place.")
        views = [b for b in self._bindings.values() if b.call and _key(b.tensor) == _key(tensor)]
        if any(t is tensor for b in views for t in _tensors(b.call)):
            raise TraceError(
                f"{tracer.places.here()}: the module changes the shape of a tensor that has views in place. "
                "Use the call without the underscore."
            )
        node = self.node(tensor)
        with tracer.decisions.inside(), tracer.fake_mode:
            old = torch.ops.aten.alias.default(tensor)
        self._bindings[id(old)] = dataclasses.replace(self._bindings[id(tensor)], tensor=old)
        storage.root = old if storage.root is tensor else storage.root
        for other in tracer.graph.nodes:
            other.meta["val"] = _swapped(other.meta.get("val"), tensor, old)
        target, args, kwargs = call(old)
        with tracer.decisions.inside(), tracer.fake_mode:
            run()
        node = tracer.node(target, (node, *tracer.argument(args[1:])), tracer.argument(kwargs), tensor)
        self._bindings[id(tensor)] = _Binding(tensor, node, storage.version, (target, args, kwargs), (), _key(tensor))

    def shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake tensor to write to; a real one gets a stand-in that takes its place from here on."""
        self.check_writable(tensor)
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._shadows:
            tracer = self.tracer
            owned = ((name, t) for name, t in tracer.attributes.owned.items() if _key(t) == _key(tensor))
            if (name := next(owned, (None,))[0]) is not None:
                raise TraceError(
                    f"{tracer.places.here()}: the module writes to its parameter or buffer '{name}' from "
                    "traced values. An engine has no state: return the new value instead."
                )
            if id(tensor) in self._constant_views:
                return self._shadow_view(tensor)
            if tensor._base is not None or _key(tensor) in self._shadowed_memory:
                raise TraceError(
                    f"{tracer.places.here()}: a view of a constant tensor is written to from traced values. "
                    "Write to the tensor itself, or to a clone."
                )
            fake = tracer.fake_mode.from_tensor(tensor, static_shapes=True)
            self.made(fake)
            self.bind(fake, tracer.attribute(tensor))
            self._shadows[id(tensor)] = (tensor, fake)
            self._shadowed_memory.add(_key(tensor))
        return self._shadows[id(tensor)][1]

    def note_constant_views(self, out: Any, call: Call, path: tuple[int, ...] = ()) -> None:
        """Remember how a call without traced arguments made views, should their memory be written to later."""
        if isinstance(out, torch.Tensor):
            arguments = _tensors(call[1:])
            if (
                not isinstance(out, FakeTensor) and id(out) not in self._constant_views
                and all(t is not out for t in arguments) and any(_key(t) == _key(out) for t in arguments)
            ):  # fmt: skip
                self._constant_views[id(out)] = (out, call, path)
        elif isinstance(out, (tuple, list)):
            for index, item in enumerate(out):
                self.note_constant_views(item, call, (*path, index))

    def _shadow_view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stand-in of a real view: the same view of its base's stand-in."""
        _, (func, args, kwargs), path = self._constant_views[id(tensor)]
        for base in _tensors((args, kwargs)):
            if _key(base) == _key(tensor):
                self.shadow(base)
        with self.tracer:
            out = func(*args, **kwargs)  # type: ignore[operator]
        for index in path:
            out = out[index]
        self._shadows[id(tensor)] = (tensor, out)
        return out

    def is_shadowed(self, tensor: torch.Tensor) -> bool:
        """Whether traced values have been written to a real tensor or to one that shares its memory."""
        return bool(self._shadows) and _key(tensor) in self._shadowed_memory

    def with_shadows(self, value: Any) -> Any:
        """Arguments with every real tensor that was written to replaced by its stand-in."""
        if not self._shadows:
            return value

        def swap(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in self._shadows:
                return self._shadows[id(tensor)][1]
            if id(tensor) in self._constant_views and self.is_shadowed(tensor):
                return self._shadow_view(tensor)
            return tensor

        return tree_map_only(torch.Tensor, swap, value)

    def versions(self, value: Any) -> list[int]:
        """torch's own write counters of the traced tensors in a call's arguments."""
        return [t._version for t in _tensors(value) if isinstance(t, FakeTensor)]

    def check_inputs(self, fakes: list[torch.Tensor], names: list[str]) -> None:
        """Refuse a module that has written to its inputs."""
        for fake, name in zip(fakes, names, strict=True):
            if self._storages[_key(fake)].version:
                raise TraceError(
                    f"The module writes to its input '{name}' in place, which an engine would not do to "
                    "the caller's tensor. Clone the input first."
                )

    def _shared_at_one(self, call: Call) -> bool:
        """Whether a call that copies for larger sizes returns its argument's memory where dynamic sizes are 1."""
        sizes = {symbol: 1 if dim.min <= 1 else dim.max for symbol, dim in self.tracer.symbols.items()}
        if 1 not in sizes.values():
            return False
        at_one = lambda v: int(evaluate(expression(v), sizes)) if is_symbolic(v) else v  # noqa: E731

        def small(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return at_one(value)
            shape, stride = ([at_one(v) for v in values] for values in (value.shape, value.stride()))
            return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")

        func, args, kwargs = call
        with unset_fake_temporarily():
            args, kwargs = tree_map(small, (args, kwargs))
            try:
                return _key(func(*args, **kwargs)) == _key(args[0])
            except RuntimeError:  # it cannot be called with such sizes, which is a claim of its own
                return False

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
            out = view.func(view.base, *view.args)
        new = self.tracer.node(view.func, (node, *self.tracer.argument(view.args)), {}, out)
        if view.index is None:
            return new
        import operator

        return self.tracer.node(operator.getitem, (new, view.index), {}, out[view.index], like=new)

    def _write_back(self, binding: _Binding, node: torch.fx.Node, storage: _Storage) -> torch.fx.Node:
        views = self._chain(binding, storage)
        contents = [storage.node]
        for view in views[:-1]:
            contents.append(self._apply(view, contents[-1]))
        for view, content in zip(reversed(views), reversed(contents), strict=True):
            inverse = _INVERSES.get(view.func)
            if inverse is None:
                raise TraceError(
                    f"{self.tracer.places.here()}: writing through a {qualified_name(view.func)} view is not "
                    "supported. "
                    "Write to a clone and put the parts together."
                )
            target, args = inverse(view)
            with self.tracer.decisions.inside(), self.tracer.fake_mode:
                new_args = (content, node, *args) if target in _SCATTERS else (node, *args)
                values = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in new_args]
                out = target(*values)
            node = self.tracer.node(target, tuple(self.tracer.argument(a) for a in new_args), {}, out)
        return node


class _ViewRecorder(TorchDispatchMode):
    """Writes down the view operators that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[torch.Tensor, _View]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and func not in _INVERSES:
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], torch.Tensor):
            parts = out if isinstance(out, (tuple, list)) else None
            rest = _positional(func, args, kwargs or {})[1:]
            for index, tensor in enumerate([out] if parts is None else parts):
                if isinstance(tensor, torch.Tensor) and tensor is not args[0] and _key(tensor) == _key(args[0]):
                    view = _View(func, rest, args[0], None if parts is None else index, parts or ())
                    self.made[id(tensor)] = (tensor, view)
        return out


def _positional(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A call's arguments, all by position."""
    rest = func._schema.arguments[len(args) :]
    while rest and not any(a.name in kwargs for a in rest[-1:]):
        rest = rest[:-1]
    return (*args, *(kwargs.get(a.name, a.default_value) for a in rest))


def _copies_if_needed(call: Call) -> bool:
    name = getattr(call[0], "__name__", "").split(".")[0]
    return name in ("reshape", "reshape_as", "flatten", "ravel", "contiguous") and isinstance(call[1][0], FakeTensor)


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
    dim = view.args[1] if len(view.args) > 1 else 0
    assert view.index is not None
    lengths = [part.shape[dim] for part in view.parts]
    start = sum(lengths[: view.index])
    return torch.ops.aten.slice_scatter.default, (dim, start, start + lengths[view.index], 1)


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
    _ATEN.view_as_real.default: lambda v: (_ATEN.view_as_complex.default, ()),
    _ATEN.view_as_complex.default: lambda v: (_ATEN.view_as_real.default, ()),
    _ATEN._conj.default: lambda v: (_ATEN._conj.default, ()),
    _ATEN._neg_view.default: lambda v: (_ATEN._neg_view.default, ()),
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


def _swapped(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(value, (tuple, list)) and any(v is old for v in value):
        return [new if v is old else v for v in value]
    return new if value is old else value


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return _key(a) == _key(b) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
