"""One run of a module under a tracer, from its inputs to the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from torch2rt.errors import Torch2RTError, TraceError
from torch2rt.graph import GraphMeta, Split
from torch2rt.interface import Shape
from torch2rt.objects import has_changed, parts
from torch2rt.passes.partitioning.effects import draws
from torch2rt.sizes import in_words
from torch2rt.structure import objects_in, unflatten
from torch2rt.tracing.aten import OperatorRecorder
from torch2rt.tracing.calls.randomness import same_states
from torch2rt.tracing.calls.refusals import RefusedError, describe_refusal
from torch2rt.tracing.module_state import EarlierValue, ModuleState, depends_on_values
from torch2rt.tracing.patches.libraries import libraries_as_values
from torch2rt.tracing.patches.memos import cleared
from torch2rt.tracing.patches.number_types import PLAIN_CLASSES
from torch2rt.tracing.patches.process_switches import (
    FOR_THIS_THREAD,
    without_collections,
    without_compiler,
    without_logs,
)
from torch2rt.tracing.patches.size_functions import SIZE_FUNCTIONS
from torch2rt.tracing.patches.size_texts import SIZE_TEXTS
from torch2rt.tracing.patches.transformer import masks_as_values
from torch2rt.tracing.result import Result, end_graph
from torch2rt.tracing.sizes.guards import Accepts
from torch2rt.tracing.tracer import Tracer
from torch2rt.tracing.whole_calls import whole_calls


def run_traced(
    module: torch.nn.Module,
    tracer: Tracer,
    leaves: Sequence[torch.Tensor],
    shapes: Sequence[Shape],
    output_names: str | Sequence[str] | None,
    accepts: Accepts,
) -> torch.fx.GraphModule:
    """Trace with these sizes standing for the dynamic ones.

    A module that keeps something between calls runs twice. The second run must not use values that the first has kept.
    Where both runs compute the same, a claim that only the first has made is dropped: it compares the sizes with those
    of a call before the trace, as a module does that keeps a table for the sizes of its last call.
    """
    interface, recorder = tracer.interface, tracer.recorder
    fakes = [
        tracer.placeholder(i, spec, leaf, shape)
        for i, (spec, leaf, shape) in enumerate(zip(interface.inputs, leaves, shapes, strict=True))
    ]
    args, kwargs = unflatten(interface.arguments, fakes)
    operators = OperatorRecorder(recorder, tracer) if tracer.records_operators else nullcontext()
    state = ModuleState(module)
    try:
        with ExitStack() as stack:
            without = (without_compiler, without_collections(), without_logs())
            masks = masks_as_values(tracer.values.is_traced)
            switches = (
                torch.no_grad(),
                *without,
                cleared(),
                *FOR_THIS_THREAD,
                *SIZE_FUNCTIONS,
                *SIZE_TEXTS,
                PLAIN_CLASSES,
                masks,
                libraries_as_values(),
                whole_calls(tracer) if recorder.fallback else nullcontext(),
                enable_python_dispatcher(),
            )
            generators = nullcontext() if recorder.generators is None else recorder.generators.watched()
            for context in (*switches, generators, operators, tracer):
                stack.enter_context(context)
            tracer.keep_promises(fakes)
            objects = [(one, dict(parts(one))) for one in objects_in((args, kwargs))]
            result = Result.of(tracer, module(*args, **kwargs))
            remembered = [kept for kept in state.kept_tensors() if depends_on_values(tracer.values, kept[-1])]
            claims = recorder.decisions.set_aside()
            if remembered or claims and state.has_changed():
                for name, owner, key, _ in remembered:
                    owner[key] = EarlierValue(name, recorder.location.here)
                before = recorder.now()
                again = _second_run(tracer, lambda: module(*args, **kwargs), is_optional=not remembered)
                is_same = again is not None and result.is_same(again, recorder)
                recorder.back_to(before)
                claims = {} if is_same and not recorder.decisions.fixed() else claims
            recorder.decisions.claims.update(claims)
            if recorder.generators is not None:
                recorder.generators.settle()
        if tracer.refused is not None:
            raise tracer.refused
    except Torch2RTError as error:
        error.args = (in_words(str(error), recorder.symbols),)
        raise
    except GuardOnDataDependentSymNode as error:
        raise TraceError(
            f"{recorder.location.of(error)}: the module's Python depends on a size that depends on tensors' values, "
            "such as how many elements a mask selects. A fixed graph cannot: move the decision out of the module."
        ) from error
    except Exception as error:
        if isinstance(error, AssertionError) and str(error).startswith("Guard failed"):
            raise TraceError(
                f"The program was exported for other sizes ({error}). Give torch.export.export the dynamic_shapes that "
                "are to be served."
            ) from error
        if not isinstance(error, TypeError) or "SymInt" not in str(error):
            raise tracer.refusal(error, shapes) from error
        raise TraceError(
            f"{recorder.location.of(error)}: Python code needs a dynamic size as a plain number ({error}). Make the "
            "dimension static, or compute with the size."
        ) from error
    finally:
        state.restore()
    if changed := next((one for one, before in objects if has_changed(before, dict(parts(one)))), None):
        raise TraceError(
            f"The module changes the {type(changed).__name__} among its inputs, which an engine would not do to the "
            'caller\'s. Convert it with state="write", which does, or with state="explicit", which returns a new one.'
        )
    tracer.values.storages.check_inputs(fakes, [spec.name for spec in interface.inputs])
    interface = end_graph(interface, recorder, result, output_names)
    splits: list[Split] = []
    for decision in tracer.eager.refusals_of_small(recorder.decisions):
        recorder.decisions.claims.setdefault(decision.claim, decision)
    interface = recorder.decisions.check(interface, accepts, splits)
    _check_eager(tracer, module, leaves, shapes if splits else None)
    asserted = recorder.decisions.asserted()
    recorder.decisions.closed = True
    checked = {symbol for claim in asserted for symbol in claim.free_symbols}
    for node in reversed(recorder.graph.nodes):  # what no output needs; inputs stay: the signature is the module's
        is_checked = any(symbol in checked for symbol, _ in node.meta.get("unbacked", {}).values())
        if node.op not in ("placeholder", "output") and not node.users and not is_checked:
            if not draws(node):
                recorder.graph.erase_node(node)
            elif not recorder.fallback:
                recorder.has_left_out = True
                recorder.graph.erase_node(node)
    graph_module = torch.fx.GraphModule(recorder.constants.module(), recorder.graph, type(module).__name__)
    for node in recorder.graph.nodes:
        node.meta["origin"] = node.name
    graph_module.meta["torch2rt"] = GraphMeta(
        interface,
        recorder.symbols,
        recorder.decisions.assumed,
        splits=tuple(splits),
        asserted=asserted,
        has_left_out=recorder.has_left_out,
    )
    return graph_module


def _second_run(tracer: Tracer, run: Callable[[], Any], is_optional: bool) -> Result | None:
    """The result of a module's second run, or `None` where an optional one fails."""
    refused = tracer.refused
    try:
        return Result.of(tracer, run())
    except Exception:
        if not is_optional:
            raise
        tracer.refused = refused
        return None


def _check_eager(
    tracer: Tracer, module: torch.nn.Module, leaves: Sequence[torch.Tensor], shapes: Sequence[Shape] | None
) -> None:
    """Raise `RefusedError` for a call that torch's real kernels refuse at these shapes, the smallest by default."""
    interface, recorder = tracer.interface, tracer.recorder
    inputs = {spec.name: spec.dtype for spec in interface.inputs}
    if shapes is None:
        shapes = [spec.min for spec in interface.inputs]
        if interface.unmet(shapes) is not None:
            shapes = [spec.opt for spec in interface.inputs]
    sizes = {symbol: shapes[dim.input][dim.axis] for symbol, dim in recorder.symbols.items()}
    if (refusal := tracer.eager.refusal(sizes)) is None:
        return
    call, error = refusal
    is_example = [tuple(leaf.shape) for leaf in leaves] == [spec.opt for spec in interface.inputs]
    if not sizes and is_example and runs(module, interface.arguments, leaves):
        return  # the call refuses the values that it was asked about, such as a matrix of zeros
    message = describe_refusal(call, error, sizes, inputs)
    if sizes and not call.mixes_types:
        at = ", ".join(f"{dim} = {sizes[symbol]}" for symbol, dim in recorder.symbols.items())
        message += f" The sizes are those for {at}, which the engine would serve. Narrow the range."
    raise RefusedError(message, of_types=call.mixes_types) from error


def runs(module: torch.nn.Module, arguments: Any, leaves: Sequence[torch.Tensor]) -> bool:
    """Whether torch's real kernels take the example itself; the module stays as it is."""
    args, kwargs = unflatten(arguments, [leaf.detach().clone() for leaf in leaves])
    state = ModuleState(module)
    try:
        with torch.no_grad(), same_states():
            module(*args, **kwargs)
    except Exception:
        return False
    finally:
        state.restore()
    return True
