"""One run of a module on fake tensors, in which the torch calls that it makes are recorded.

A call with a traced argument (a fake tensor or a symbolic size) is recorded; every other call runs for real, so all
that does not depend on the inputs is folded. A call is recorded at the highest level that has a converter:

1. the torch function itself;
2. a Python-level composite (`F.multi_head_attention_forward`) is opened, and the calls in its body are recorded;
3. anything else is run one level down, as the ATen operators it makes, through torch's decompositions where needed.

What survives all three is recorded as it is, for `lower` to report together with all others of its kind.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import keyword
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.interp import sympy_interp

from torch2rt.errors import ConversionError, TraceError
from torch2rt.interface import Input, Interface, Shape
from torch2rt.registry import Call, Target, by_schema, load, overload_of, qualified_name
from torch2rt.sizes import Dim, PythonAlgebra, expression, in_words, is_symbolic
from torch2rt.tracing.aten import SHAPES_IN_PLACE, AtenRecorder
from torch2rt.tracing.computed_masks import COUNTED, Selection, selected
from torch2rt.tracing.computed_masks import Places as SelectedPlaces
from torch2rt.tracing.eager import EagerCalls, Recorded, describe_refusal, first_line, other_types
from torch2rt.tracing.guards import Decisions
from torch2rt.tracing.in_place import out_of_place
from torch2rt.tracing.patches.attributes import Attributes
from torch2rt.tracing.patches.fake_mode import FakeMode, with_numbers
from torch2rt.tracing.randomness import states
from torch2rt.tracing.source_lines import Places
from torch2rt.tracing.storages import Storages

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
MEMORY_IN_PLACE = frozenset({"resize_", "resize_as_", "set_", "as_strided_", "__set__"})
READS = frozenset(
    {"__bool__", "__int__", "__float__", "__index__", "item", "__contains__", "equal", "allclose", "is_nonzero",
     "_assert", "_assert_async"}
)  # fmt: skip
NUMBERS = (bool, int, float, complex)
LEAVES_TORCH = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage"})


class UnseenTensorError(TraceError):
    """A tensor came out of calls that went past the tracer."""


class RefusedError(TraceError):
    """The module itself, or torch, raises an error for inputs that the engine would serve.

    `of_types` says that it does so for inputs of these types, whatever their sizes.
    """

    def __init__(self, message: str, of_types: bool = False) -> None:
        super().__init__(message)
        self.of_types = of_types


class _FakeMode(FakeMode):
    """Runs the calls of one tracer on fake tensors, and notices writes of calls that it does not know of."""

    def __init__(self, tracer: Tracer) -> None:
        env = tracer.decisions.shape_env
        super().__init__(shape_env=env, allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.tracer.decisions.are_torchs and func._schema.is_mutable:
            raise UnseenTensorError(f"{self.tracer.places.here()}: {func} was not called in a way that torch2rt sees.")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Tracer(TorchFunctionMode):
    """One run of one module, with everything that belongs to it."""

    def __init__(self, module: torch.nn.Module, interface: Interface, take_strays: bool = False) -> None:
        super().__init__()
        self.take_strays = take_strays
        self.interface = interface
        self.registry = load()
        self.graph = torch.fx.Graph()
        self.places = Places(module)
        self.symbols: dict[sympy.Symbol, Dim] = {}
        self.decisions = Decisions(self.symbols, self.places)
        self.fake_mode = _FakeMode(self)
        self.storages = Storages(self)
        self.attributes = Attributes(self.graph, module)
        self._sizes: dict[sympy.Basic, Any] = {}
        self.opening: list[Target] = []
        self.eager = EagerCalls(self)
        self.failed: tuple[Exception, Recorded | None] | None = None  # the last error of a torch call, and the call
        self.selects = False  # whether a computed mask has selected elements
        self.refused: TraceError | None = None  # the first that was raised: a module may catch what eager never raises

    # Inputs ----------------------------------------------------------------------------------------------------------

    def refusal(self, error: Exception, hints: Sequence[Shape]) -> RefusedError:
        """What to say of an error that the module has raised for inputs of these shapes."""
        call = self.failed[1] if self.failed is not None and self.failed[0] is error else None
        inputs = {spec.name: spec.dtype for spec in self.interface.inputs}
        if call is not None and call.mixes:
            sizes = {symbol: hints[dim.input][dim.axis] for symbol, dim in self.symbols.items()}
            return RefusedError(describe_refusal(call, error, sizes, inputs), of_types=True)
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(inputs, hints, strict=True))
        text = f"{self.places.of(error)}: the module raises {type(error).__name__} ({first_line(error)}) for {shapes}."
        weights = {w.dtype for w in self.attributes.owned.values() if w.dtype.is_floating_point}
        if "type" in str(error) and not weights & set(inputs.values()) and (advice := other_types(inputs, weights)):
            return RefusedError(in_words(text, self.symbols) + advice, of_types=True)
        if self.symbols:
            text += " The engine would serve such sizes. Narrow the range, or compute with x.shape, not with numbers."
        return RefusedError(in_words(text, self.symbols))

    def placeholder(self, index: int, spec: Input, leaf: torch.Tensor, hint: Shape) -> torch.Tensor:
        """The fake tensor of an input, of this shape, whose dynamic sizes become symbols."""
        sizes = [DimDynamic.DYNAMIC if axis in spec.dynamic else DimDynamic.STATIC for axis in range(leaf.dim())]
        fake = self.fake_mode.from_tensor(
            torch.empty(hint, dtype=leaf.dtype, device=leaf.device, memory_format=spec.memory_format),
            source=ConstantSource(f"input_{index}"),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
        )
        fake.item_memo = None  # torch would give out a symbol for the value of a 0-d integer on the CPU
        # the node's name is a parameter in the Python that torch.fx generates
        is_parameter = spec.name.isidentifier() and not keyword.iskeyword(spec.name) and spec.name != "self"
        node = self.graph.placeholder(spec.name if is_parameter else f"input_{index}")
        node.meta.update(val=fake, module="", source="", input=index)
        self.storages.bind(fake, node)
        for axis in spec.dynamic:
            symbol = fake.shape[axis].node.expr
            self.decisions.hints[symbol] = hint[axis]
            self.symbols[symbol] = Dim(index, spec.name, axis, spec.min[axis], spec.max[axis])
            size = self.graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
            size.meta.update(val=fake.shape[axis], module="", source="")
            self._sizes[symbol] = size
        return fake

    # Calls -----------------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Target, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._function(overload_of(func, args, kwargs or {}), args, kwargs or {})
        except TraceError as error:
            self.refused = self.refused or error
            raise

    def _function(self, func: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.selects and any(map(_is_selected, tree_leaves((args, kwargs)))):
            if func not in (torch.Tensor.__setitem__, torch.Tensor.__getitem__) or _is_selected(args[0]):
                return self._open(func, functools.partial(selected, func), args, kwargs)
        if self.take_strays and any(map(_is_wrapped, tree_leaves((args, kwargs)))):
            return self._for_real(func, args, kwargs)  # StrayRecorder sees what it does to the tensors inside
        # what a function passed to an operator computes from is not among the operator's arguments
        if not self.is_traced((args, kwargs)) and not isinstance(func, torch._ops.HigherOrderOperator):
            if (written := out_of_place(func, args, kwargs)[0]) is not None:
                self._before_real_write(written)
            elif func is torch.Tensor.__setitem__:
                self._before_real_write(args[0])
            return self._for_real(func, args, kwargs)
        if func is torch.Tensor.__setitem__:
            self.storages.shadow(args[0])
        args, kwargs = self.storages.with_shadows((args, kwargs))
        call = self._described(func, args, kwargs)
        try:
            out = self.guarded(func, lambda: self._call(func, args, kwargs))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if self.failed is None or self.failed[0] is not error:
                self.failed = error, call
            raise
        if call is not None and (func is torch.Tensor.__setitem__ or _is_of_tensors(out)):
            self.eager.note(call)
        return out

    def _described(self, func: Target, args: Any, kwargs: Any) -> Recorded | None:
        """A call of the module's own, or of torch's Python code, to ask torch's real kernels about."""
        is_ours = any(self.registry.body(function) is not None for function in self.opening)
        return None if is_ours or _is_autocasting((args, kwargs)) else self.eager.describe(func, args, kwargs)

    def _for_real(self, func: Target, args: Any, kwargs: Any) -> Any:
        """Run a call that depends on no input, whose result becomes a constant."""
        if getattr(func, "__name__", "") in READS | LEAVES_TORCH and (drawn := self._drawn((args, kwargs))):
            raise TraceError(drawn)
        with self.decisions.inside():
            out = self.constant(func, args, kwargs, func)
        self._is_made(out)
        self.storages.note_constant_views(out, (func, args, kwargs))
        return out

    def constant(self, func: Target, args: Any, kwargs: Any, name: Target) -> Any:
        """The result of a call of real tensors, which `name` has made; a random one must not reach the graph.

        Symbolic sizes, which wrapped tensors may have inside, need torch's Python dispatcher. It runs decompositions
        instead of kernels, of which not all are right: that of a bilinear resize to a size that does not follow from
        the scale factor is not.
        """
        drawn, before = self._drawn((args, kwargs)), states((args, kwargs))
        is_real = not any(map(_is_wrapped, tree_leaves((args, kwargs))))
        with torch._C._DisablePythonDispatcher() if is_real else contextlib.nullcontext():
            out = func(*args, **kwargs)
        if not all(map(torch.equal, before, states((args, kwargs)))):
            drawn = self._draws(qualified_name(name), name)
        if drawn and not isinstance(out, torch.Tensor) and any(isinstance(x, NUMBERS) for x in tree_leaves(out)):
            raise TraceError(drawn)
        if drawn:
            self.storages.taint(out, drawn)
        return out

    def _draws(self, what: str, func: Target = torch.randn) -> str:
        return f"{self.places.here()}: {what} draws random numbers. {self.registry.advice(func, torch.randn)}."

    def _drawn(self, value: Any) -> str:
        """What is wrong with arguments that are random, if any are."""
        if not self.storages.tainted:
            return ""
        return next(filter(None, map(self.storages.taint_of, tree_leaves(value))), "")

    def _is_made(self, out: Any) -> None:
        """Let a function that may only write to what it makes write to this real tensor."""
        if self.storages.is_frozen:
            self.storages.made(out)
            self.attributes.keep(out)

    def guarded(self, func: Target, call: Callable[[], Any]) -> Any:
        """Run a traced call; what cannot be known without real data is an error at the user's line."""
        try:
            return call()
        except DATA_DEPENDENT as error:
            raise TraceError(self._depends_on_data(func)) from error
        except UnsupportedOperatorException as error:
            raise TraceError(
                f"{self.places.here()}: torch itself cannot tell the shape of what {qualified_name(func)} returns "
                f"without running it ({error.func} has no fake implementation)."
            ) from error
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if getattr(func, "__name__", "") in LEAVES_TORCH:
                raise TraceError(
                    f"{self.places.here()}: {qualified_name(func)} takes a traced tensor out of torch, so what follows "
                    "cannot be recorded. Keep the computation in torch."
                ) from error
            raise

    def _depends_on_data(self, func: Target) -> str:
        name = qualified_name(func)
        if getattr(func, "__name__", "").split(".")[0] in READS:
            return (
                f"{self.places.here()}: the module's Python depends on the value of a tensor ({name}), which a fixed "
                "graph cannot. Compute both sides and choose with torch.where, or move the decision out of the module."
            )
        advice = self.registry.advice(func) or "Where its use allows it, keep all elements and mask instead."
        return f"{self.places.here()}: the shape of {name}'s result depends on the values of its tensors. {advice}"

    def _call(self, func: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._changes_shape(func, args, kwargs):
            return args[0]
        written, without_write = out_of_place(func, args, kwargs)
        if written is not None:
            return self._write((func, args, kwargs), written, without_write)
        if (out := self.composed(func, args, kwargs)) is not NotImplemented:
            return out
        if self.registry.is_factory(func) and (value := self._fold_factory(func, args, kwargs)) is not None:
            return value
        if self.registry.find(func) is not None and not _is_autocasting(args):
            return self.record(func, args, kwargs)
        if func not in self.opening and (body := _opened(func)) is not None:
            return self._open(func, body, args, kwargs)
        with self.decisions.inside(), self.fake_mode, AtenRecorder(self, func):
            out = func(*args, **kwargs)
        self.storages.adopt(out, args, func)
        return out

    def composed(self, func: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What torch2rt's own body of a call makes of it; `NotImplemented` if there is none, or it is being run."""
        body = self.registry.body(func)
        if body is None or any(self.registry.body(other) is body for other in self.opening):
            return NotImplemented
        signature = inspect.signature(body)
        named_args, named = by_schema(func, signature.parameters, args, kwargs)
        with contextlib.suppress(TypeError):  # the operator calls something else by one of these names
            signature.bind(*named_args, **named)
            args, kwargs = named_args, named
        with self.decisions.inside():
            out = self._open(func, body, args, kwargs)
        if out is not NotImplemented:
            self.selects |= _is_selected(out[0] if isinstance(out, tuple) and out else out)
        return out

    def _open(self, func: Target, body: Target, args: Any, kwargs: Any) -> Any:
        """Record the calls that a call's body makes."""
        self.opening.append(func)
        try:
            with self:
                return body(*args, **kwargs)
        except ConversionError as error:
            if type(error) is not ConversionError:
                raise
            raise TraceError(f"{self.places.here()}: {qualified_name(func)}: {error}.") from error
        finally:
            self.opening.pop()

    def record(self, func: Target, args: Any, kwargs: Any) -> Any:
        """Run one call on the fake tensors and append it to the graph."""
        node_args, node_kwargs = self.argument(args), self.argument(kwargs)
        before = self.storages.versions((args, kwargs))
        with self.decisions.inside(), self.fake_mode, self.fake_mode.reading() as numbers:
            fake_args, fake_kwargs = self._fake(args), self._fake(kwargs)
            try:
                out = func(*fake_args, **fake_kwargs)
            except (NotImplementedError, UnsupportedOperatorException):
                # cuDNN's kernels have no fake ones; torch's others give the same shapes
                with torch.backends.cudnn.flags(enabled=False):
                    out = func(*fake_args, **fake_kwargs)
        if before != self.storages.versions((args, kwargs)):
            raise TraceError(
                f"{self.places.here()}: {qualified_name(func)} writes to one of its arguments in an unknown way."
            )
        if numbers:
            node_args, node_kwargs = self.argument(with_numbers((args, kwargs), numbers))
        node = self.node(func, tuple(node_args), node_kwargs, out)
        self.bind(out, node, (func, args, kwargs))
        return out

    def _fake(self, value: Any) -> Any:
        """A call's argument with stand-ins for weights: calls of fake tensors alone torch's fake mode remembers.

        It makes the same stand-ins itself, but later. A 0-d tensor stays, as torch may take it for a number.
        """
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.dim() and value.is_floating_point():
            return self.fake_mode.from_tensor(value, static_shapes=True)
        if type(value) in (tuple, list):
            return type(value)(map(self._fake, value))
        return {k: self._fake(v) for k, v in value.items()} if type(value) is dict else value

    def bind(self, out: Any, node: torch.fx.Node, call: Call, path: tuple[int, ...] = ()) -> None:
        """Remember which node computes each tensor of a call's result."""
        if isinstance(out, torch.Tensor):
            self.storages.bind(out, node, call, path)
        elif isinstance(out, (tuple, list)):
            for index, item in enumerate(out):
                if isinstance(item, (torch.Tensor, tuple, list)):
                    part = self.node(operator.getitem, (node, index), {}, item, like=node)
                    self.bind(item, part, call, (*path, index))

    def node(
        self, target: Target, args: Any, kwargs: Any, out: Any, like: torch.fx.Node | None = None
    ) -> torch.fx.Node:
        """A new call in the graph, whose result is `out`; it stems from the line at hand, or that of another node."""
        node = self.graph.call_function(target, args, kwargs)
        if like is None:
            node.meta.update(val=out, module=self.places.module(), source=self.places.line())
            if self.opening:
                node.meta["function"] = self.opening[0]
        else:
            node.meta.update(like.meta, val=out)
        return node

    # Writes ----------------------------------------------------------------------------------------------------------

    def _changes_shape(self, func: Target, args: Any, kwargs: Any) -> bool:
        """Take care of a call that changes in place what a tensor looks at, and say whether it was one."""
        name = getattr(func, "__name__", "").split(".")[0]
        if name in MEMORY_IN_PLACE and getattr(getattr(func, "__self__", None), "__name__", "data") == "data":
            what = "assigning to x.data" if name == "__set__" else qualified_name(func)
            raise TraceError(f"{self.places.here()}: {what} gives a tensor other memory. Make a new tensor instead.")
        if name not in SHAPES_IN_PLACE or getattr(torch.Tensor, name) is not func:
            return False
        target = getattr(torch.Tensor, name[:-1])
        self.storages.reshape(args[0], lambda: func(*args, **kwargs), lambda old: (target, (old, *args[1:]), kwargs))
        return True

    def _before_real_write(self, written: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """A call without traced arguments is about to write to real tensors.

        What the graph has recorded of them so far must keep its value, and a module's own state is not ours to change.
        """
        for tensor in written if isinstance(written, tuple) else (written,):
            self._check_real_write(tensor)

    def _check_real_write(self, tensor: torch.Tensor) -> None:
        self.storages.check_writable(tensor)
        if (name := self.attributes.before_write(tensor)) is not None:
            raise TraceError(
                f"{self.places.here()}: the module writes to its parameter or buffer '{name}'. "
                "An engine has no state: keep it outside the module, or put the module into eval mode."
            )

    def _write(self, call: Call, written: torch.Tensor | tuple[torch.Tensor, ...], without_write: Call) -> Any:
        several = isinstance(written, tuple)
        shadows = [self.storages.shadow(tensor) for tensor in (written if several else (written,))]
        func, args, kwargs = self.storages.with_shadows(call)
        value = self._call(*self.storages.with_shadows(without_write))
        values = list(value) if several else [value]
        if len(values) != len(shadows) or not all(isinstance(one, torch.Tensor) for one in values):
            raise TraceError(
                f"{self.places.here()}: {qualified_name(func)} writes several results, which is not supported."
            )
        with self.decisions.inside(), self.fake_mode:  # the write itself, so that torch refuses what eager refuses
            func(*args, **kwargs)
        for shadow, one in zip(shadows, values, strict=True):
            if one.dtype != shadow.dtype or one.shape != shadow.shape:
                with self.decisions.inside(), self.fake_mode, AtenRecorder(self, func):
                    one = one.to(shadow.dtype).expand(shadow.shape)
            self.storages.write(shadow, self.argument(one))
        return written if not several else type(value)(written)

    # Arguments -------------------------------------------------------------------------------------------------------

    def is_traced(self, value: Any) -> bool:
        """Whether a fake tensor of this run, or a symbolic size, is anywhere in a call's arguments."""
        if _is_selected(value):
            return True
        if isinstance(value, torch.Tensor):
            return isinstance(value, FakeTensor) or self.storages.is_shadowed(value)
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

    def argument(self, value: Any) -> Any:
        """A call's argument as the graph holds it."""
        if _is_selected(value):
            raise TraceError(f"{self.places.here()}: {COUNTED}.")
        if isinstance(value, torch.Tensor):
            node = self.storages.node(value)
            return self.attribute(value) if node is None else node
        if is_symbolic(value):
            return self._size(expression(value), value)
        if isinstance(value, (tuple, list)):
            items = [self.argument(v) for v in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            return {k: self.argument(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, torch.fx.GraphModule):
            return self.attribute(value)
        if isinstance(value, torch.Generator):
            raise TraceError(self._draws("a call with a generator"))
        return value

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new fake tensor of the same type."""
        with self.decisions.inside(), self.fake_mode, torch._C.DisableTorchFunction():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)  # also of a constant

    def stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor of the same type that only stands for a value, as the operand of a subgraph."""
        fake = self.like(tensor)
        node = self.graph.placeholder("operand")
        node.meta.update(val=fake, module="", source="")
        self.storages.bind(fake, node)
        return fake

    def attribute(self, tensor: torch.Tensor | torch.fx.GraphModule) -> torch.fx.Node:
        """The node of a parameter, a buffer, a tensor made while tracing, or a subgraph."""
        if isinstance(tensor, FakeTensor) or _is_wrapped(tensor):
            raise UnseenTensorError(
                f"{self.places.here()}: a tensor that torch made without a call that torch2rt could see reached one "
                "that it sees."
            )
        if drawn := self._drawn(tensor):
            raise TraceError(drawn)
        return self.attributes.node(tensor)

    def _size(self, expr: sympy.Basic, value: Any) -> Any:
        """The node that computes a symbolic number from the inputs' sizes."""
        expr = self.decisions.shape_env.replace(expr)
        if expr.is_number or isinstance(expr, sympy.logic.boolalg.BooleanAtom):
            return type_of(value)(expr)
        if (node := self._sizes.get(expr)) is None:
            one = torch.fx.proxy.GraphAppendingTracer(self.graph)  # torch.sym_max refuses proxies of several
            env = {s: torch.fx.Proxy(n, one) for s, n in self._sizes.items() if isinstance(s, sympy.Symbol)}
            node = sympy_interp(PythonAlgebra, env, expr).node
            node.meta.update(val=value, module=self.places.module(), source=self.places.line())
            self._sizes[expr] = node
        return node

    def _fold_factory(self, func: Target, args: Any, kwargs: Any) -> Any:
        """The real result of a factory whose size is static, or `None`."""
        with self.decisions.inside(), self.fake_mode:
            out = func(*args, **kwargs)
        if any(is_symbolic(size) for size in out.shape):
            return None
        stand_in = lambda t: torch.empty((), dtype=t.dtype, device=t.device).expand(  # noqa: E731
            [1 if is_symbolic(s) else s for s in t.shape]
        )
        args, kwargs = tree_map_only(FakeTensor, stand_in, (args, kwargs))
        if self.is_traced((args, kwargs)):
            return None
        out = func(*args, **kwargs)
        self._is_made(out)
        return out


def _is_of_tensors(out: Any) -> bool:
    """Whether a call's result is a tensor, or holds some."""
    return isinstance(out, torch.Tensor) or isinstance(out, (tuple, list)) and any(map(_is_of_tensors, out))


def _is_selected(value: Any) -> bool:
    """Whether this stands for what a computed mask selects; such objects call themselves tensors."""
    return type(value) in (Selection, SelectedPlaces)


def _is_wrapped(value: Any) -> bool:
    """Whether this is a tensor of `torch.vmap` and the like around another one."""
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _is_autocasting(args: Any) -> bool:
    """Whether torch would cast this call's tensors: its casts are only visible among the ATen operators."""
    devices = {t.device.type for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
    return any(torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in devices)


def type_of(value: Any) -> type:
    """The Python type that a symbolic number stands for."""
    return {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]


@functools.cache
def _opened(func: Target) -> Target | None:
    """A Python-level torch function with its first line's dispatch to the tracer taken out, so that its body is traced.

    It is the same code over a copy of its module's globals in which `has_torch_function` says no.
    """
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    if not isinstance(func, types.FunctionType) or not set(checks) & set(func.__code__.co_names):
        return None
    no = dict.fromkeys(checks, lambda *args: False)
    body = types.FunctionType(
        func.__code__, {**func.__globals__, **no}, func.__name__, func.__defaults__, func.__closure__
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body
