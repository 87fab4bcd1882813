"""Trace: run a module once on fake tensors and write down the torch calls it makes, as a `torch.fx` graph.

`trace` prepares the inputs, and chooses the sizes that stand for the dynamic ones; `tracer.py` is the run itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from torch2rt.arguments import given_names, whole_number
from torch2rt.aten import StrayRecorder
from torch2rt.eager import describe_refusal
from torch2rt.errors import InputError, Torch2RTError, TraceError
from torch2rt.guards import Takes
from torch2rt.interface import Input, Interface, Shape, clipped, describe_inputs
from torch2rt.progress import Spinner
from torch2rt.randomness import are_equal, states_elsewhere
from torch2rt.signature import distinct, keyword_names, tensor_names
from torch2rt.state import Forgotten, State
from torch2rt.structure import flatten, unflatten
from torch2rt.switches import without_collections, without_compiler, without_logs, without_scripts
from torch2rt.symbolic import expression, in_words, is_symbolic, to_json
from torch2rt.tracer import RefusedError, Tracer, UnseenTensorError
from torch2rt.transformer import masks_as_values

LOGS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")  # which report errors that we do too


def trace(
    module: torch.nn.Module,
    inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    input_names: str | Sequence[str] | None = None,
    output_names: str | Sequence[str] | None = None,
    min_shapes: Any = None,
    opt_shapes: Any = None,
    max_shapes: Any = None,
    max_batch_size: int | None = None,
    progress: bool | None = None,
) -> torch.fx.GraphModule:
    """Record the torch calls that `module(*inputs, **kwargs)` makes.

    The arguments are those of `torch2rt.torch2rt`; `progress` shows a spinner with the module that is being traced, by
    default where stderr is a terminal. The graph has one placeholder per input tensor and one output, a
    flat tuple; running it on real tensors does what the module does. Every node carries `meta["val"]` (fake tensors
    with symbolic sizes), `meta["module"]` (module path) and `meta["source"]` (the user's `file:line`); the graph module
    carries `meta["interface"]`, the `torch2rt.interface.Interface` of the engine to be.

    Raises `InputError` for inputs that TensorRT cannot take, `TraceError` where the module's Python depends on tensor
    values or decides something about a dynamic size that does not hold for its whole range.

    >>> graph = trace(torch.nn.ReLU(), [torch.randn(2, 3)], max_batch_size=4)
    >>> [node.op for node in graph.graph.nodes]
    ['placeholder', 'call_function', 'output']
    """
    from torch2rt.backend import DTYPES

    if not isinstance(module, torch.nn.Module):
        raise InputError(f"Expected a torch.nn.Module to convert, got {type(module).__name__}.")
    leaves, arguments = flatten(as_arguments(inputs, kwargs), torch.is_tensor, "inputs")
    module = getattr(module, "_orig_mod", module)  # what torch.compile has wrapped
    names = given_names("input_names", input_names)
    names = tensor_names(module.forward, arguments) if names is None else names
    max_batch_size = whole_number("max_batch_size", max_batch_size, 1)
    specs = describe_inputs(
        leaves, arguments, names, min_shapes, opt_shapes, max_shapes, max_batch_size, DTYPES
    )  # fmt: skip
    parameters = keyword_names(module.forward)
    spinner = Spinner("trace", progress)

    def run(hint: Sequence[Shape], forgotten: Sequence[str] = ()) -> tuple[torch.fx.GraphModule, list[str]]:
        tracer = Tracer(module, Interface(copy.deepcopy(specs), arguments, parameters), take_strays)
        with spinner.turning(lambda: tracer.places.latest):
            return _run(module, tracer, leaves, hint, output_names, forgotten, takes)

    def refusal(shapes: Sequence[Shape]) -> BaseException | None:
        """The error that the module itself raises with these shapes."""
        static = [replace(spec, min=shape, opt=shape, max=shape) for spec, shape in zip(specs, shapes, strict=True)]
        tracer = Tracer(module, Interface(static, arguments, parameters), take_strays)
        try:
            with spinner.turning(lambda: tracer.places.latest):
                _run(module, tracer, leaves, shapes, None, (), lambda shapes: True)
        except RefusedError as error:
            return error.__cause__
        except Torch2RTError:
            return None  # not the module's own
        return None

    def takes(shapes: Sequence[Shape]) -> bool:
        return refusal(shapes) is None

    failure: Exception | None = None
    take_strays = first_was_unseen = False
    for hint in (hints := _hints(specs, leaves)):
        try:
            before = states_elsewhere()
            graph, remembered = run(hint)
            if states_elsewhere() != before and not are_equal(graph, run(hint)[0]):
                raise TraceError(
                    "The module draws numbers from Python's random or numpy.random, and does something else each time. "
                    "An engine draws no random numbers. Pass the noise to the module as an input."
                )
            if remembered:  # perhaps only for somebody to look at
                run(hint, remembered)
            return graph
        except Exception as error:  # perhaps only for these sizes
            unseen = isinstance(error, UnseenTensorError) or "TorchScript interpreter" in str(error)
            if unseen and not take_strays:  # watching all that torch runs makes tracing slower by half
                hints.append(hint)
                take_strays = True
            if failure is None or first_was_unseen:
                failure, first_was_unseen = error, unseen
    assert failure is not None
    if isinstance(failure, RefusedError) and not failure.of_types:
        if (own := refusal([tuple(leaf.shape) for leaf in leaves])) is not None:
            raise own  # whatever the sizes
    raise failure


def as_arguments(inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call by position and by name, where one that is no list or tuple stands for itself."""
    return tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,), dict(kwargs or {})


def _hints(specs: Sequence[Input], leaves: Sequence[torch.Tensor]) -> list[list[Shape]]:
    """Sizes to trace with, in the order to try them: such as the engine serves, whatever the example's are.

    torch specialises on 0 and 1, so all dynamic sizes are at least 2. Any such sizes would do, but dimensions that the
    module ties together must agree, which the user's own shapes do, and small ones may derive a 1 that large ones do
    not.
    """
    opt = [spec.opt for spec in specs]
    example = [clipped(tuple(leaf.shape), s.min, s.max) for s, leaf in zip(specs, leaves, strict=True)]
    fit = [
        shapes for shapes in (opt, [s.max for s in specs], example, [s.min for s in specs])
        if all(shape[axis] > 1 for spec, shape in zip(specs, shapes, strict=True) for axis in spec.dynamic)
    ]  # fmt: skip
    raised = [tuple(max(size, 2) if axis in s.dynamic else size for axis, size in enumerate(s.opt)) for s in specs]
    return list({tuple(shapes): shapes for shapes in [*fit, raised]}.values())


def _run(
    module: torch.nn.Module, tracer: Tracer, leaves: Sequence[torch.Tensor], hints: Sequence[Shape],
    output_names: str | Sequence[str] | None, forgotten: Sequence[str], takes: Takes,
) -> tuple[torch.fx.GraphModule, list[str]]:  # fmt: skip
    """Trace with these sizes standing for the dynamic ones; the graph, and what the module keeps of the inputs' values.

    `forgotten` are names of what an earlier run has left in the module. The module is run twice then, and the second
    time without them.
    """
    interface, remembered = tracer.interface, []
    fakes = [
        tracer.placeholder(i, spec, leaf, hint)
        for i, (spec, leaf, hint) in enumerate(zip(interface.inputs, leaves, hints, strict=True))
    ]
    args, kwargs = unflatten(interface.arguments, fakes)
    strays = StrayRecorder(tracer) if tracer.take_strays else nullcontext()
    state = State(module)
    try:
        with ExitStack() as stack:
            switches = (torch.no_grad(), without_compiler, without_scripts(), without_collections(), without_logs(LOGS))
            masks = masks_as_values(tracer.is_traced)
            for context in (*switches, masks, enable_python_dispatcher(), strays, tracer):
                stack.enter_context(context)
            result = module(*args, **kwargs)
            if forgotten:
                for name, owner, key, _ in list(state.kept()):
                    if name in forgotten:
                        owner[key] = Forgotten(name, tracer.places.here)
                result = module(*args, **kwargs)
        if tracer.refused is not None:
            raise tracer.refused
        if not forgotten:
            remembered = [name for name, _, _, value in state.kept() if _depends_on_values(tracer, value)]
    except Torch2RTError as error:
        error.args = (in_words(str(error), tracer.symbols),)
        raise
    except Exception as error:
        if not isinstance(error, TypeError) or "SymInt" not in str(error):
            raise tracer.refusal(error, hints) from error
        raise TraceError(
            f"{tracer.places.of(error)}: Python code needs a dynamic size as a plain number ({error}). Make the "
            "dimension static, or compute with the size."
        ) from error
    finally:
        state.restore()
    tracer.storages.check_inputs(fakes, [spec.name for spec in interface.inputs])
    _output(tracer, result, output_names)
    tracer.decisions.check(interface, takes)
    _check_eager(tracer)
    for node in reversed(tracer.graph.nodes):  # what no output needs; inputs stay: the signature is the module's
        if node.op not in ("placeholder", "output") and not node.users:
            tracer.graph.erase_node(node)
    graph_module = torch.fx.GraphModule(tracer.attributes.module(), tracer.graph, type(module).__name__)
    graph_module.meta.update(interface=interface, symbols=tracer.symbols, assumed=tracer.decisions.assumed)
    return graph_module, remembered


def _check_eager(tracer: Tracer) -> None:
    """Raise `RefusedError` for a call that torch's real kernels refuse at the smallest sizes."""
    interface = tracer.interface
    inputs = {spec.name: spec.dtype for spec in interface.inputs}
    shapes = [spec.min for spec in interface.inputs]
    if interface.unmet(shapes) is not None:
        shapes = [spec.opt for spec in interface.inputs]
    sizes = {symbol: shapes[dim.input][dim.axis] for symbol, dim in tracer.symbols.items()}
    if (refusal := tracer.eager.refusal(sizes)) is None:
        return
    call, error = refusal
    message = describe_refusal(call, error, sizes, inputs)
    if sizes and not call.mixes:
        at = ", ".join(f"{dim} = {sizes[symbol]}" for symbol, dim in tracer.symbols.items())
        message += f" The sizes are those for {at}, which the engine would serve. Narrow the range."
    raise RefusedError(message, of_types=call.mixes) from error


def _depends_on_values(tracer: Tracer, value: Any) -> bool:
    """Whether tensors were computed from the inputs' values, and not from their sizes alone."""
    todo = [node for t in tree_leaves(value) if isinstance(t, FakeTensor) and (node := tracer.storages.node(t))]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        sources = node.all_input_nodes if isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)) else []
        todo += (new := [n for n in sources if n not in seen])
        seen.update(new)
    return False


def _output(tracer: Tracer, result: Any, names: str | Sequence[str] | None) -> None:
    leaves, tracer.interface.result = flatten(
        result, lambda value: isinstance(value, torch.Tensor) or is_symbolic(value), "result"
    )
    nodes: list[torch.fx.Node] = []
    for leaf in leaves:
        if is_symbolic(leaf):
            tracer.interface.leaves.append({"size": to_json(expression(leaf), tracer.symbols)})
            continue
        node = tracer.argument(leaf)
        if node not in nodes:
            nodes.append(node)
        tracer.interface.leaves.append({"output": nodes.index(node)})
    if not nodes:
        raise TraceError("The module returns no tensor, so there is nothing for an engine to compute.")
    taken = {spec.name for spec in tracer.interface.inputs}
    names = given_names("output_names", names)
    if names is None:
        names = distinct((f"output_{i}" for i in range(len(nodes))), taken)
    if len(names) != len(nodes):
        raise InputError(f"output_names has {len(names)} names for {len(nodes)} output tensors: {names}.")
    if len({*names, *taken}) != len(names) + len(taken) or not all(names):
        raise InputError(
            f"output_names must be distinct, not empty and no input's name: {names}, inputs {sorted(taken)}."
        )
    tracer.interface.outputs = names
    tracer.graph.output(tuple(nodes))
