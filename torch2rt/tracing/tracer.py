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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves, tree_map_only

from torch2rt.callables import Target, qualified_name, writable
from torch2rt.errors import ConversionError, TraceError
from torch2rt.graph import add_input
from torch2rt.interface import Input, Interface, Shape
from torch2rt.promises import Promise
from torch2rt.registry import Call, by_schema, overload_of
from torch2rt.sizes import is_symbolic
from torch2rt.tracing.aten import SHAPES_IN_PLACE, AtenRecorder
from torch2rt.tracing.calls.data_dependence import UnknownResultError, guarded, reads_values
from torch2rt.tracing.calls.eager import EagerCalls, RecordedCall
from torch2rt.tracing.calls.in_place import out_of_place
from torch2rt.tracing.calls.number_reads import read, with_sizes
from torch2rt.tracing.calls.opaque import record_opaque
from torch2rt.tracing.calls.python_bodies import python_body
from torch2rt.tracing.calls.randomness import put_back, states, writes_random_numbers
from torch2rt.tracing.calls.real import run_for_real
from torch2rt.tracing.calls.refusals import RefusedError, describe_error
from torch2rt.tracing.computed_masks import is_selected, selected
from torch2rt.tracing.memory.tensors import is_wrapped, subclass_among, subclass_of, tensor_versions
from torch2rt.tracing.patches.number_types import with_dtypes
from torch2rt.tracing.recorder import Recorder
from torch2rt.tracing.sizes.size_tensors import SizeTensors
from torch2rt.tracing.values import RecordingMode, UnseenWriteError, Values

MEMORY_IN_PLACE = frozenset({"resize_", "resize_as_", "set_", "as_strided_", "__set__"})


class Tracer(RecordingMode):
    """The torch function mode of one run of one module.

    - `recorder`: the graph, and `values`: which node computes each tensor.
    - `records_operators`: whether an `OperatorRecorder` records the ATen operators that no torch function made.
    - `refused`: the first error that was raised, as a module may catch what eager torch never raises.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        interface: Interface,
        records_operators: bool = False,
        fallback: bool = False,
        unbacked: bool = False,
    ) -> None:
        self.recorder = Recorder(module, fallback, unbacked)
        super().__init__(Values(self.recorder, self._call_recorded))
        self.interface = interface
        self.records_operators = records_operators
        self.eager = EagerCalls(self.recorder, self.values.storages)
        self.size_tensors = SizeTensors()
        self.refused: TraceError | None = None
        self._failed: tuple[Exception, RecordedCall | None] | None = None  # the last error of a torch call, the call
        self._has_selections = False  # whether a computed mask has selected elements

    def refusal(self, error: Exception, shapes: Sequence[Shape]) -> RefusedError:
        """The error to raise for one that the module has raised for inputs of these shapes."""
        call = self._failed[1] if self._failed is not None and self._failed[0] is error else None
        return describe_error(error, call, shapes, self.interface, self.recorder)

    def placeholder(self, index: int, spec: Input, leaf: torch.Tensor, shape: Shape) -> torch.Tensor:
        """The fake tensor of an input, of this shape, whose dynamic sizes become symbols."""
        from torch._dynamo.source import ConstantSource  # torch's compiler takes seconds to import

        recorder = self.recorder
        sizes = [DimDynamic.DYNAMIC if axis in spec.dynamic else DimDynamic.STATIC for axis in range(leaf.dim())]
        fake = recorder.fake_mode.from_tensor(
            torch.empty(shape, dtype=leaf.dtype, device=leaf.device, memory_format=spec.memory_format),
            source=ConstantSource(f"input_{index}"),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
        )
        fake.item_memo = None  # torch would give out a symbol for the value of a 0-d integer on the CPU
        # the node's name is a parameter in the Python that torch.fx generates
        is_parameter = spec.name.isidentifier() and not keyword.iskeyword(spec.name) and spec.name != "self"
        node = add_input(recorder.graph, spec.name if is_parameter else f"input_{index}")
        node.meta.update(val=fake, module="", source="", input=index)
        self.values.storages.bind(fake, node)
        for axis in spec.dynamic:
            dim = spec.dim(index, axis)
            size = recorder.graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
            size.meta.update(val=fake.shape[axis], module="", source="")
            recorder.add_symbol(fake.shape[axis].node.expr, dim, shape[axis], size)
        return fake

    def keep_promises(self, fakes: Sequence[torch.Tensor]) -> None:
        """Tell torch how sizes with a common root depend on each other: such claims are checked at every call."""
        first: dict[str, tuple[Any, Promise]] = {}
        for spec, fake in zip(self.interface.inputs, fakes, strict=True):
            for promise in spec.promises:
                size = fake.shape[promise.axis]
                other, one = first.setdefault(promise.root, (size, promise))
                if other is not size and is_symbolic(size) and is_symbolic(other):
                    with self.recorder.decisions.in_torch():
                        bool((size - promise.offset) * one.factor == (other - one.offset) * promise.factor)

    # Calls -----------------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Target, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            if (value := self.size_tensors.value(func, args, self.recorder.location.here)) is not NotImplemented:
                return value
            if self.recorder.unbacked and (value := read(func, args, self._recorded)) is not NotImplemented:
                return value
            if self.recorder.unbacked and func is torch.Tensor.__int__:
                self.recorder.decisions.note_number_maker()
            args, kwargs = self.size_tensors.replaced(func, *with_dtypes(args, kwargs or {}))
            with self.recorder.decisions.reading_place(func is torch.Tensor.__getitem__):
                out = self._function(overload_of(writable(func), args, kwargs), args, kwargs)
            self.size_tensors.note(func, args, kwargs, out)
            return out
        except TraceError as error:
            self.refused = self.refused or error
            raise

    def _function(self, func: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._has_selections and any(map(is_selected, tree_leaves((args, kwargs)))):
            if func not in (torch.Tensor.__setitem__, torch.Tensor.__getitem__) or is_selected(args[0]):
                return self._open(func, functools.partial(selected, func), args, kwargs)
        if self.records_operators and any(map(is_wrapped, tree_leaves((args, kwargs)))):
            return self._for_real(func, args, kwargs)[0]  # OperatorRecorder sees what it does to the tensors inside
        # what a function passed to an operator computes from is not among the operator's arguments
        if not self.values.is_traced((args, kwargs)) and not isinstance(func, torch._ops.HigherOrderOperator):
            if not self.recorder.fallback or not writes_random_numbers(func):
                if (written := out_of_place(func, args, kwargs)[0]) is not None:
                    self._before_real_write(written)
                elif func is torch.Tensor.__setitem__:
                    self._before_real_write(args[0])
                out, is_random = self._for_real(func, args, kwargs)
                if not is_random:
                    return out
        if func is torch.Tensor.__setitem__:
            self.values.written_constants.writable(args[0])
        args, kwargs = self.values.written_constants.replaced((args, kwargs))
        call = self._described(func, args, kwargs)
        try:
            out = self.whole_if_unknown(func, args, kwargs, lambda: self._call(func, args, kwargs))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if self._failed is None or self._failed[0] is not error:
                self._failed = error, call
            raise
        if call is not None and (func is torch.Tensor.__setitem__ or _holds_tensors(out)):
            self.eager.note(call)
        return out

    def whole_if_unknown(self, func: Target, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        """Record a call by way of its body, or as it is where torch must run it to know what it returns."""
        before = self.recorder.now(), tensor_versions((args, kwargs)), self.refused
        failure: Exception
        try:
            return guarded(self.recorder, func, call)
        except UnknownResultError as error:
            failure, unknown = error, error
            if self.recorder.unbacked and (sized := with_sizes(args, kwargs, self._recorded)) is not None:
                with contextlib.suppress(TraceError, RuntimeError, TypeError):
                    return self._function(func, *sized)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # perhaps of the fake kernel alone
            text = f"{self.recorder.location.here()}: what {qualified_name(func)} returns is not known: {error}"
            failure, unknown = error, UnknownResultError(text)
        if not self.recorder.fallback or before[1] != tensor_versions((args, kwargs)):
            raise failure
        self.recorder.back_to(before[0])
        refused, self.refused = self.refused, before[2]
        try:
            with torch._C.DisableTorchFunction():
                return record_opaque(self.values, func, args, kwargs, unknown)
        except TraceError as error:
            if error is not unknown or failure is unknown:
                raise
            self.refused = refused
            raise failure from None

    def whole(self, func: Target, args: Any, kwargs: Any, run: Target) -> Any:
        """Record a call as it is; `run` shows what it returns."""
        if any(map(is_selected, tree_leaves((args, kwargs)))):  # traced again with such sizes, see `trace.Traces`
            here = self.recorder.location.here()
            raise TraceError(f"{here}: the shapes of what {func.__name__} is given depend on the values of tensors.")
        error = UnknownResultError(
            f"{self.recorder.location.here()}: what {func.__name__} returns is not known: on drawn values it raises "
            "errors, returns views of its inputs or other things than tensors, or writes to its inputs."
        )
        return record_opaque(self.values, func, args, kwargs, error, run)

    def _described(self, func: Target, args: Any, kwargs: Any) -> RecordedCall | None:
        """A call of the module's own, or of torch's Python code, to ask torch's real kernels about."""
        is_ours = any(self.recorder.registry.body(function) is not None for function in self.recorder.open_calls)
        return None if is_ours or _is_autocasting((args, kwargs)) else self.eager.describe(func, args, kwargs)

    def _for_real(self, func: Target, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """Run a call that depends on no input, whose result becomes a constant.

        With fallback, a call that draws random numbers is none: the second value says so, and none are drawn.
        """
        if reads_values(func) and (reason := self.recorder.constants.why_forbidden((args, kwargs))):
            raise TraceError(reason)
        before = states((args, kwargs)) if self.recorder.fallback else []
        with self.recorder.decisions.in_torch():
            out = run_for_real(self.recorder, func, args, kwargs, func)
        if before and put_back(before, (args, kwargs)):
            return None, True
        self._allow_writes(out)
        self.values.written_constants.note_views(out, (func, args, kwargs))
        return out, False

    def _call(self, func: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._changes_shape(func, args, kwargs):
            return args[0]
        if (kind := subclass_among((args, kwargs))) is not None and func not in self.recorder.open_calls:
            return self._open_subclass(kind, func, args, kwargs)
        written, without_write = out_of_place(func, args, kwargs)
        if written is not None:
            return self._write((func, args, kwargs), written, without_write)
        if (out := self._composed(func, args, kwargs)) is not NotImplemented:
            return out
        registry = self.recorder.registry
        if registry.is_factory(func) and (value := self._fold_factory(func, args, kwargs)) is not None:
            return value
        if registry.find(func) is not None and not _is_autocasting(args):
            with contextlib.suppress(UnseenWriteError):  # perhaps a call in its body says what it writes to
                return self.values.record(func, args, kwargs)
        if func not in self.recorder.open_calls and (body := python_body(func)) is not None:
            return self._open(func, body, args, kwargs)
        with self.recorder.fake_tensors(), AtenRecorder(self.values, func, self._composed):
            out = func(*args, **kwargs)
        self.values.storages.adopt(out, args, func)
        return out

    def _composed(self, func: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What torch2rt's own body of a call makes of it; `NotImplemented` if there is none, or it is being run."""
        registry = self.recorder.registry
        body = registry.body(func)
        if body is None or any(registry.body(other) is body for other in self.recorder.open_calls):
            return NotImplemented
        signature = inspect.signature(body)
        named_args, named = by_schema(func, signature.parameters, args, kwargs)
        with contextlib.suppress(TypeError):  # the operator calls something else by one of these names
            signature.bind(*named_args, **named)
            args, kwargs = named_args, named
        fallback = self.recorder.fallback
        try:
            with self.recorder.decisions.in_torch():
                out = self._open(func, body, args, kwargs)
        except TraceError as error:
            is_ours = isinstance(func, torch._ops.HigherOrderOperator)  # whose functions torch would trace itself
            if not fallback or is_ours or type(error.__cause__) is not ConversionError:
                raise
            if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
                return NotImplemented  # `AtenRecorder` records what it writes
            with contextlib.suppress(UnseenWriteError):
                return self.values.record(func, args, kwargs)  # which only torch can do as it is asked here
            return NotImplemented
        if self.recorder.unbacked and is_selected(out[0] if isinstance(out, tuple) and out else out):
            return NotImplemented
        if out is not NotImplemented:
            self._has_selections |= is_selected(out[0] if isinstance(out, tuple) and out else out)
        return out

    def _open(self, func: Target, body: Target, args: Any, kwargs: Any) -> Any:
        """Record the calls that a call's body makes."""
        self.recorder.open_calls.append(func)
        try:
            return self._call_recorded((body, args, kwargs))
        except ConversionError as error:
            if type(error) is not ConversionError:
                raise
            raise TraceError(f"{self.recorder.location.here()}: {qualified_name(func)}: {error}.") from error
        finally:
            self.recorder.open_calls.pop()

    def _open_subclass(self, kind: Any, func: Target, args: Any, kwargs: Any) -> Any:
        """Record the calls that a tensor subclass makes of a call, on the tensors that it is made of."""
        try:
            return self._open(func, lambda *a, **k: kind.__torch_function__(func, (kind,), a, k), args, kwargs)
        except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
            name = next(
                (name for name, owned in self.recorder.constants.owned.items() if subclass_of(owned) is kind),
                "a tensor",
            )
            raise TraceError(
                f"{self.recorder.location.here()}: '{name}' is a {kind.__module__}.{kind.__name__}, which does not say "
                f"what {qualified_name(func)} does with it in torch calls that torch2rt can see "
                f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}). Convert a module whose parameters "
                "are plain tensors, such as before it was quantised, with precision=."
            ) from error

    def _call_recorded(self, call: Call) -> Any:
        """Make a call and record the torch functions that it calls, where torch has set the mode aside."""
        func, args, kwargs = call
        with self:
            return func(*args, **kwargs)

    def _recorded(self, func: Target, *args: Any) -> Any:
        return self._call_recorded((func, args, {}))

    def _fold_factory(self, func: Target, args: Any, kwargs: Any) -> Any:
        """The real result of a factory whose size is static, or `None`."""
        with self.recorder.fake_tensors():
            out = func(*args, **kwargs)
        if any(is_symbolic(size) for size in out.shape):
            return None
        stand_in = lambda t: torch.empty((), dtype=t.dtype, device=t.device).expand(  # noqa: E731
            [1 if is_symbolic(s) else s for s in t.shape]
        )
        args, kwargs = tree_map_only(FakeTensor, stand_in, (args, kwargs))
        if self.values.is_traced((args, kwargs)):
            return None
        out = func(*args, **kwargs)
        self._allow_writes(out)
        return out

    # Writes ----------------------------------------------------------------------------------------------------------

    def _allow_writes(self, out: Any) -> None:
        """Let a function that may only write to what it makes write to this real tensor."""
        if self.values.storages.is_limited:
            self.values.storages.allow_writes(out)
            self.recorder.constants.keep(out)

    def _changes_shape(self, func: Target, args: Any, kwargs: Any) -> bool:
        """Take care of a call that changes in place what a tensor looks at, and say whether it was one."""
        name = getattr(func, "__name__", "").split(".")[0]
        if name in MEMORY_IN_PLACE and getattr(getattr(func, "__self__", None), "__name__", "data") == "data":
            what = "assigning to x.data" if name == "__set__" else qualified_name(func)
            raise TraceError(
                f"{self.recorder.location.here()}: {what} gives a tensor other memory. Make a new tensor instead."
            )
        if name not in SHAPES_IN_PLACE or getattr(torch.Tensor, name) is not func:
            return False
        target = getattr(torch.Tensor, name[:-1])
        self.values.storages.reshape(
            args[0], lambda: func(*args, **kwargs), lambda old: (target, (old, *args[1:]), kwargs)
        )
        return True

    def _before_real_write(self, written: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """A call without traced arguments is about to write to real tensors.

        What the graph has recorded of them so far must keep its value, and a module's own state is not ours to change.
        """
        for tensor in written if isinstance(written, tuple) else (written,):
            self._check_real_write(tensor)

    def _check_real_write(self, tensor: torch.Tensor) -> None:
        self.values.storages.check_writable(tensor)
        self.recorder.constants.save_before_write(tensor)
        if (name := self.recorder.constants.owned_name(tensor)) is not None:
            raise TraceError(
                f"{self.recorder.location.here()}: the module writes to its parameter or buffer '{name}'. "
                "An engine has no state: keep it outside the module, put the module into eval mode, or convert it with "
                'state="write".'
            )

    def _write(self, call: Call, written: torch.Tensor | tuple[torch.Tensor, ...], without_write: Call) -> Any:
        several = isinstance(written, tuple)
        constants, recorder = self.values.written_constants, self.recorder
        targets = [constants.writable(tensor) for tensor in (written if several else (written,))]
        func, args, kwargs = constants.replaced(call)
        value = self._call(*constants.replaced(without_write))
        values = list(value) if several else [value]
        if len(values) != len(targets) or not all(isinstance(one, torch.Tensor) for one in values):
            raise TraceError(
                f"{recorder.location.here()}: {qualified_name(func)} writes several results, which is not supported."
            )
        with recorder.fake_tensors():  # the write itself, so that torch refuses what eager refuses
            func(*args, **kwargs)
        for target, one in zip(targets, values, strict=True):
            if one.dtype != target.dtype or one.shape != target.shape:
                with recorder.fake_tensors(), AtenRecorder(self.values, func, self._composed):
                    one = one.to(target.dtype).expand(target.shape)
            self.values.storages.write(target, self.values.argument(one))
        return written if not several else type(value)(written)


def _holds_tensors(out: Any) -> bool:
    """Whether a call's result is a tensor, or holds some."""
    return isinstance(out, torch.Tensor) or isinstance(out, (tuple, list)) and any(map(_holds_tensors, out))


def _is_autocasting(args: Any) -> bool:
    """Whether torch would cast this call's tensors: its casts are only visible among the ATen operators."""
    devices = {t.device.type for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
    return any(torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in devices)
