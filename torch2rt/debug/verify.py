"""Verify: hold what was converted against its module, on the example inputs and, if asked, over the served range.

`inputs.py` chooses the inputs. `comparison.py` says whether two results are one but for roundings, `disturbance.py`
what roundings do to this network, and `bisection.py` where a difference begins.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch2rt.debug.bisection import OfEngine, OfReference, Place, first_difference, first_module
from torch2rt.debug.comparison import MULTIPLE, Comparison, is_near
from torch2rt.debug.disturbance import Disturbed
from torch2rt.debug.inputs import Call, Tensors, calls_in_range, first_calls, fitted
from torch2rt.engine.build import rounds_to_tf32
from torch2rt.engine.engine import Engine
from torch2rt.engine.report import Difference, Verification
from torch2rt.errors import AccuracyError, EngineError, InputError, Torch2RTError
from torch2rt.interface import Interface, Shape
from torch2rt.network import Network
from torch2rt.passes.order import Pass
from torch2rt.passes.ranges import tensors_of
from torch2rt.passes.wide_products import WideProducts
from torch2rt.runtime.converted import Loaded
from torch2rt.runtime.partitioned.reference import PartitionedNetwork
from torch2rt.runtime.reference_module import ReferenceModule
from torch2rt.structure import bare_name, flatten, is_same, unflatten
from torch2rt.tracing.calls.randomness import same_states
from torch2rt.tracing.module_state import ModuleState
from torch2rt.tracing.patches.process_switches import without_compiler, without_logs

ATTEMPTS = 8  # runs with other disturbances before a difference counts


class Unverifiable(Exception):
    """There is nothing to compare with: the module, or the reference, cannot be evaluated here."""


def check_mode(mode: Any) -> None:
    """Raise `InputError` for what is no mode of a verification."""
    if not (isinstance(mode, bool) or mode == "range"):
        raise InputError(f"verify={mode!r} is none of True, False and 'range'.")


def verify(
    module: torch.nn.Module,
    graph: torch.fx.GraphModule,
    network: Network,
    model_trt: Any,
    tensors: Tensors,
    mode: bool | str = True,
    *,
    tf32: bool | None = None,
    build: Callable[[Network], Engine] | None = None,
) -> Verification:
    """Compare a conversion with its module, which stays as it is; raises `AccuracyError` where they differ.

    - `graph`, `network`, `model_trt`: what `trace`, `lower` and `TRTModule` have made of the module.
    - `tensors`: the example's, in the order of the interface; they are not written to.
    - `mode`: `True` for the example inputs, `"range"` for sizes and values beside them.
    - `tf32`: as the engine was built. `build`: makes an engine of a network in the same way, to find where it is wrong.

    Where the engine runs on this machine's GPU, it is compared, else the reference. Example inputs whose sizes are not
    served are cut or repeated to sizes that are. So are large ones for the reference, where smaller sizes are served.
    """
    return _Verifier(module, graph, network, model_trt, tf32, build).verify(tensors, mode)


class Verifying:
    """The verification of a conversion that is under way, of the module and what `trace` and `lower` made of it.

    Without a GPU, the reference is compared `while_building`, which TensorRT does with one core. `finish` compares what
    has not been, and puts it into the report, or why nothing could be compared. Both raise `AccuracyError`. `also` are
    shapes to compare at in any mode.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        graph: torch.fx.GraphModule,
        network: Network | PartitionedNetwork,
        tensors: Tensors,
        mode: bool | str,
        *,
        tf32: bool | None = None,
        build: Callable[[Network], Engine] | None = None,
        passes: Sequence[Pass] | None = None,
        also: Sequence[Sequence[Shape]] = (),
    ) -> None:
        self.mode, self.tensors, self.also = mode, tensors, also
        self.found: Verification | Unverifiable | None = None
        self.verifier = functools.partial(_Verifier, module, graph, network, tf32=tf32, build=build, passes=passes)
        self.early: _Verifier | None = None
        if mode and not torch.cuda.is_available():
            self._keep(self._make_early)

    def _make_early(self) -> None:
        self.early = self.verifier(None)  # which reads the network, and that must not be while it is built

    def while_building(self) -> None:
        if (early := self.early) is not None:
            self._keep(lambda: early.verify(self.tensors, self.mode, self.also))

    def finish(self, model_trt: Any) -> None:
        if self.mode and self.found is None:
            self._keep(lambda: self.verifier(model_trt).verify(self.tensors, self.mode, self.also))
        if isinstance(self.found, Unverifiable):
            text = f"that it computes what the module does, which was not verified: {self.found}"
            model_trt.report.assumptions.append(text)
        else:
            model_trt.report.verified = self.found

    def _keep(self, action: Callable[[], Verification | None]) -> None:
        try:
            self.found = action()
        except Unverifiable as error:
            self.found = error


class _Verifier:
    """Compares the engine, or the reference where no engine runs here, with the module: `run` gives their outputs."""

    def __init__(
        self,
        module: torch.nn.Module,
        graph: torch.fx.GraphModule,
        lowered: Network | PartitionedNetwork,
        model_trt: Any,
        tf32: bool | None = None,
        build: Callable[[Network], Engine] | None = None,
        passes: Sequence[Pass] | None = None,
    ) -> None:
        self.module = getattr(module, "_orig_mod", module)  # what torch.compile has wrapped
        self.graph, self.lowered, self.model_trt, self.build = graph, lowered, model_trt, build
        self.passes = passes  # that had run when the graph was lowered
        self.interface: Interface = lowered.interface
        self.notes: list[str] = []
        self.on_engine = False
        self.tf32 = torch.cuda.is_available() and any(rounds_to_tf32(d, tf32) for d in lowered.definitions)
        self.run, self.by = self._engine() or self._reference()

    def verify(self, tensors: Tensors, mode: bool | str, also: Sequence[Sequence[Shape]] = ()) -> Verification:
        start = time.perf_counter()
        result = Verification("range" if mode == "range" else "example", self.by, notes=self.notes)
        calls = first_calls(self.interface, tensors, is_slow=not self.on_engine)
        while True:
            try:
                result.differences += self.check(calls.pop(0))
                break
            except Unverifiable as error:
                if not calls:
                    raise
                self.notes.append(str(error))
        further = calls_in_range(self.interface, tensors) if mode == "range" else ()
        for call in (*(Call(list(map(fitted, tensors, shapes)), True) for shapes in also), *further):
            try:
                result.differences += self.check(call)
            except Unverifiable as error:
                self.notes.append(str(error))
        result.seconds = round(time.perf_counter() - start, 3)
        return result

    # Both sides ------------------------------------------------------------------------------------------------------

    def _engine(self) -> tuple[Callable[[Tensors], Tensors], str] | None:
        if self.model_trt is None or not torch.cuda.is_available():
            return None
        placeholders = (node.meta["val"].device for node in self.graph.graph.nodes if node.op == "placeholder")
        device = next((d for d in placeholders if d.type == "cuda"), torch.device("cuda"))
        try:
            pool: Loaded = self.model_trt.load(device)
        except EngineError as error:
            self.notes.append(f"the reference was compared, as the engine cannot run here: {error}")
            return None
        self.on_engine = True
        run = lambda tensors: pool.run([x.to(pool.device) for x in tensors])  # noqa: E731
        return run, f"the engine on {torch.cuda.get_device_name(pool.device)}"

    def _reference(self) -> tuple[Callable[[Tensors], Tensors], str]:
        try:
            reference = ReferenceModule(self.lowered) if isinstance(self.lowered, Network) else self.lowered.reference()
        except Torch2RTError as error:
            raise Unverifiable(f"no engine runs here and there is no reference: {error}") from error
        return reference.outputs, "the reference, which evaluates the network with torch"

    def _call_module(self, call: Call) -> Any:
        """What the module returns; it is left as it was.

        What `torch.compile` has wrapped is not compiled for it, unless it takes that: `torch.while_loop` may.
        """
        try:
            with without_compiler:
                return self._call_as_it_is(call)
        except Exception:
            return self._call_as_it_is(call)

    def _call_as_it_is(self, call: Call) -> Any:
        args, kwargs = unflatten(self.interface.arguments, [x.clone() for x in call.tensors])
        state = ModuleState(self.module)
        try:
            with torch.no_grad(), same_states(), self._wide_products(call):
                return self.module(*args, **kwargs)
        finally:
            state.restore()

    def _expected(self, call: Call) -> tuple[list[torch.Tensor], Any]:
        """The module's tensors, and the form of the value around them."""
        try:
            result = self._call_module(call)
        except Exception as error:
            words = f"the module raises {type(error).__name__} {call} ({(str(error).splitlines() or [''])[0]})"
            if call.made and self._refuses_sizes(call):
                raise AccuracyError(f"The engine serves sizes that the module refuses: {words}.") from error
            if call.made or isinstance(error, (NotImplementedError, torch.OutOfMemoryError)):
                raise Unverifiable(words) from error
            raise InputError(
                f"Nothing can be compared: {words}. Pass example values that the module takes, or verify=False."
            ) from error
        return flatten(result, torch.is_tensor, "result")

    def _refuses_sizes(self, call: Call) -> bool:
        """Whether the module fails on tensors without values, and not at the sizes that are tuned for: not for values.

        Such as a mask that is not as large as the input; an index that is too large for a table is no such thing.
        """
        return self._accepts([spec.opt for spec in self.interface.inputs]) and not self._accepts(call.shapes)

    def _accepts(self, shapes: Sequence[Shape]) -> bool:
        """Whether the module runs on tensors of these shapes that have no values."""
        with without_logs(), FakeTensorMode(allow_non_fake_inputs=True):
            placeholders = (node.meta["val"] for node in self.graph.graph.nodes if node.op == "placeholder")
            fakes = [torch.empty(shape, dtype=x.dtype, device=x.device) for x, shape in zip(placeholders, shapes)]
            try:
                self._call_module(Call(fakes, True))
            except Exception:
                return False
            return True

    def _disturbed(self, call: Call) -> Callable[..., Disturbed]:
        def disturb(roundings: float, seed: int, keep: Sequence[str] = ()) -> Disturbed:
            return Disturbed(self.graph, roundings, seed, self.tf32, keep, self._wide_products(call), self.on_engine)

        return disturb

    def _wide_products(self, call: Call) -> Any:
        """A context in which a CPU computes products of float16 in float32, as its own kernels take very long."""
        weights = (*self.module.parameters(), *self.graph.parameters(), *self.graph.buffers(), *call.tensors)
        slow = any(t.dtype is torch.float16 and t.device.type == "cpu" for t in weights)
        return WideProducts() if slow else contextlib.nullcontext()

    # Comparing -------------------------------------------------------------------------------------------------------

    def check(self, call: Call) -> list[Difference]:
        """The difference of each output; raises `AccuracyError` if one is too large."""
        leaves, form = self._expected(call)
        names = self.interface.outputs
        with torch.no_grad(), _without_autocast():
            try:
                with same_states():  # a segment of torch calls may draw random numbers, as the module has
                    outputs = self.run(call.tensors)
            except Torch2RTError as error:
                raise AccuracyError(f"{self.by}, fails {call}, where the module does not: {error}") from error
            given, given_form = flatten(self.interface.wrap(outputs, call.shapes), torch.is_tensor, "result")
            given_form, form = _with_tuples(given_form), _with_tuples(form)
            if _kinds(given, given_form) != _kinds(leaves, form) or not is_same(given_form, form):
                raise AccuracyError(
                    f"{self.by}, gives {_kinds(given, given_form)} {call}, the module {_kinds(leaves, form)}."
                )
            places = [leaf["output"] for leaf in self.interface.leaves if "output" in leaf]
            expected = [leaves[places.index(i)] for i in range(len(names))]
            is_half = any(t.dtype is torch.float16 for node in self.graph.graph.nodes for t in tensors_of(node))
            narrowest = torch.float16 if is_half else None
            compared = {
                name: Comparison(ours.to(theirs.device), theirs, narrowest)
                for name, ours, theirs in zip(names, outputs, expected, strict=True)
            }
            self._learn_roundings(compared, expected, call)
            shapes = list(map(list, call.shapes))
            found = {name: Difference(name, shapes, *c.worst(), c.largest) for name, c in compared.items()}
            wrong = [found[name] for name, comparison in compared.items() if not comparison.passes()]
            if wrong:
                self._fail(call, wrong, expected)
        self.notes += [
            f"{name} {comparison.doubt} {call}, so this says little about it"
            for name, comparison in compared.items()
            if comparison.doubt
        ]
        return list(found.values())

    def _learn_roundings(self, compared: Mapping[str, Comparison], expected: Tensors, call: Call) -> None:
        """Disturb the graph until every difference is explained, or roundings have been tried often enough.

        What a disturbance changes is seen beside the undisturbed graph, as the graph of a wrong trace is far from the
        module. Where they are near to each other in the first attempt, that run is saved.
        """
        before = expected
        for attempt in range(ATTEMPTS):
            if all(comparison.passes() for comparison in compared.values()):
                return
            roundings, multiple = (MULTIPLE, 1.0) if attempt else (1.0, MULTIPLE)
            after = self._disturbed(call)(roundings, attempt)(call.tensors)
            if before is expected and (attempt or not all(map(is_near, after, expected))):
                before = self._disturbed(call)(0.0, 0)(call.tensors)
            for comparison, a, b in zip(compared.values(), before, after, strict=True):
                comparison.learn(a, b, multiple)

    def _fail(self, call: Call, wrong: Sequence[Difference], expected: Tensors) -> None:
        place = self._where(call, expected)
        lines = [f"{self.by}, does not compute what the module does {call}:", *(f"  {d}" for d in wrong)]
        lines += [place.text] if place else []
        raise AccuracyError("\n".join(lines), wrong, *(place.module, place.source) if place else ())

    def _where(self, call: Call, expected: Tensors) -> Place | None:
        """Where the difference begins: in the trace, in a converter, or in what TensorRT has made of it."""
        disturb = self._disturbed(call)
        traced, moved = (disturb(roundings, 0)(call.tensors) for roundings in (0.0, 1.0))
        for ours, theirs, other in zip(traced, expected, moved, strict=True):
            passes = ours.shape == theirs.shape
            if passes:
                comparison = Comparison(ours, theirs)
                comparison.learn(ours, other, MULTIPLE)
                passes = comparison.passes()
            if not passes:
                place = first_module(self.module, lambda: self._call_module(call), call.tensors, self.graph, disturb)
                return place or Place(None, None, "The trace differs from the module.")
        values: list[Any] = []
        if not isinstance(self.lowered, Network):
            return None
        with contextlib.suppress(Exception):  # of the search, which must not hide what was found
            values.append(OfReference(self.graph, call.tensors, self.lowered.nan, self.passes))
            if self.on_engine and self.build is not None:
                values.append(OfEngine(self.graph, call.tensors, self.lowered.nan, self.build, self.passes))
            for of in values:
                if place := first_difference(self.graph, call.tensors, of, of.names, of.at_once, disturb):
                    return place
        return Place(None, None, "No single call differs when its value is looked at.") if values else None


def _kinds(leaves: Tensors, form: Any) -> str:
    """Tensors and the value around them in words; the same for two that are built alike."""
    tensors = ", ".join(f"{bare_name(x.dtype)}{list(x.shape)}" for x in leaves)
    return f"{tensors} in {form}" if form != {"leaf": 0} else tensors


def _with_tuples(form: Any) -> Any:
    """A form in which torch's named results are tuples, as its ATen operators give for what its functions name."""
    if isinstance(form, dict):
        form = {key: value if key == "constant" else _with_tuples(value) for key, value in form.items()}
        if str(form.get("class")).startswith("torch.return_types:"):
            return {"tuple": form["sequence"]}
    return [_with_tuples(item) for item in form] if isinstance(form, list) else form


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """The graph and the network have the casts in them."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
