"""Find the first call of a traced graph whose value an engine, or the reference, computes wrong."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torch2rt.backend.tensorrt import LOG
from torch2rt.callables import qualified_name
from torch2rt.debug.comparison import MULTIPLE, Comparison
from torch2rt.debug.disturbance import Disturbed
from torch2rt.engine.engine import Engine
from torch2rt.interface import Interface
from torch2rt.lowering import lower_with_values
from torch2rt.network import Network
from torch2rt.passes.order import Pass
from torch2rt.reference.evaluator import Evaluator
from torch2rt.runtime.loaded_engine import LoadedEngine
from torch2rt.runtime.pool import ContextPool

AT_ONCE = 64  # values of the reference that are looked at in one go
OUTPUTS_AT_ONCE = 8  # the same of an engine, which is built again with these as outputs
ATTEMPTS = 4  # runs with disturbances, which say how far a value may be off

Tensors = Sequence[torch.Tensor]
Values = Mapping[str, torch.Tensor]  # by the names of nodes
Disturb = Callable[..., Any]  # a `Disturbed` of the graph, of these roundings and seed, and `keep`


@dataclasses.dataclass
class Place:
    """Where a difference begins: the path of a module, `file:line`, and a sentence about it."""

    module: str | None
    source: str | None
    text: str


def first_difference(
    graph: torch.fx.GraphModule,
    tensors: Tensors,
    evaluate: Callable[[Sequence[str]], Values],
    names: Sequence[str],
    at_once: int,
    disturb: Disturb,
) -> Place | None:
    """The first of the named nodes whose value is wrong while those before it are right, by bisection.

    `evaluate` gives the values of some of these nodes that are to be looked at.
    """
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    suspects = [node for node in graph.graph.nodes if node.name in names and node.op != "placeholder"]
    while suspects:
        chosen = _spread(suspects, at_once, set(output.all_input_nodes))
        right, wrong = _split(chosen, evaluate([node.name for node in chosen]), tensors, disturb)
        if not wrong:
            return None
        first = wrong[0]
        if len(chosen) == len(suspects):
            return _place(first)
        possible = _sources(wrong[:1]) - _sources(right)
        suspects = [node for node in suspects if node in possible]
    return None


def _split(
    nodes: Sequence[torch.fx.Node], actual: Values, tensors: Tensors, disturb: Disturb
) -> tuple[list[torch.fx.Node], list[torch.fx.Node]]:
    """The nodes whose values are right, and those whose values are wrong."""
    names = [node.name for node in nodes]
    before = _kept(disturb(0.0, 0, names), tensors)
    compared = {name: _compared(actual[name], before[name]) for name in names}
    for attempt in range(ATTEMPTS):
        if all(c is not None and c.passes() for c in compared.values()):
            break
        after = _kept(disturb(MULTIPLE if attempt else 1.0, attempt, names), tensors)
        for name, comparison in compared.items():
            if comparison is not None:
                comparison.learn(before[name], after[name], 1.0 if attempt else MULTIPLE)
    passes = {name: c is not None and c.passes() for name, c in compared.items()}
    return [n for n in nodes if passes[n.name]], [n for n in nodes if not passes[n.name]]


def _kept(disturbed: Disturbed, tensors: Tensors) -> Values:
    disturbed(tensors)
    return disturbed.kept


def _compared(actual: torch.Tensor, expected: torch.Tensor) -> Comparison | None:
    """`None` where the shapes differ. The dtypes may: TensorRT's tensors for uint8 are int32."""
    if actual.shape != expected.shape:
        return None
    return Comparison(actual.to(expected.device, expected.dtype), expected)


def _spread(nodes: Sequence[torch.fx.Node], count: int, outputs: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """So many of the nodes, evenly, and the outputs among them."""
    if len(nodes) <= count:
        return list(nodes)
    places = {round((i + 1) * (len(nodes) - 1) / count) for i in range(count)}
    return [node for i, node in enumerate(nodes) if i in places or node in outputs]


def _sources(nodes: Sequence[torch.fx.Node]) -> set[torch.fx.Node]:
    """The nodes, and all that they are computed from."""
    found, todo = set(nodes), list(nodes)
    while todo:
        new = [node for node in todo.pop().all_input_nodes if node not in found]
        found.update(new)
        todo += new
    return found


def _place(node: torch.fx.Node) -> Place:
    module, source = node.meta["module"], node.meta["source"]
    while node.target is operator.getitem and isinstance(node.args[0].meta["val"], (tuple, list)):  # type: ignore
        node = node.args[0]  # type: ignore[assignment]
    call = qualified_name(node.target)  # type: ignore[arg-type]
    within = f"module '{module}'" if module else "the module itself"
    return Place(module, source, f"The first call that differs is {call} of {within}, at {source}.")


# Where the values come from ------------------------------------------------------------------------------------------


class OfReference:
    """The values of nodes as the reference computes them, from a network that is lowered anew."""

    at_once = AT_ONCE

    def __init__(
        self, graph: torch.fx.GraphModule, tensors: Tensors, nan: str, passes: Sequence[Pass] | None = None
    ) -> None:
        self.lowered, self.values = lower_with_values(graph, nan=nan, passes=passes)
        self.tensors = tensors
        self.names = list(self.values)

    def __call__(self, names: Sequence[str]) -> Values:
        lowered, also = self.lowered, [self.values[name].name for name in names]
        with LOG.capture():
            evaluator = Evaluator(lowered.definition, lowered.weights_by_layer(), also)
        specs = lowered.interface.inputs
        given = {spec.name: x.permute(spec.axes) for spec, x in zip(specs, self.tensors, strict=True)}
        results = evaluator(given)
        return {name: results[self.values[name].name] for name in names}


class OfEngine:
    """The values of nodes as engines compute them, each built with some of these values as outputs of their own."""

    at_once = OUTPUTS_AT_ONCE

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        tensors: Tensors,
        nan: str,
        build: Callable[[Network], Engine],
        passes: Sequence[Pass] | None = None,
    ) -> None:
        self.graph, self.tensors, self.nan, self.build, self.passes = graph, tensors, nan, build, passes
        self.names = list(lower_with_values(graph, nan=nan, passes=passes)[1])

    def __call__(self, names: Sequence[str]) -> Values:
        lowered, values = lower_with_values(self.graph, nan=self.nan, passes=self.passes)
        definition = lowered.definition
        given = {spec.name: x for spec, x in zip(lowered.interface.inputs, self.tensors, strict=True)}
        marked = [definition.get_output(i).name for i in range(definition.num_outputs)]
        for name in names:
            tensor = values[name]
            if tensor.name not in marked and not tensor.is_network_input:
                tensor.name = f"value_{len(marked)}"  # the engine forgets names that follow from a layer's
                definition.mark_output(tensor)
                marked.append(tensor.name)
        interface: Interface = dataclasses.replace(lowered.interface, outputs=marked)
        device = next((x.device for x in self.tensors if x.is_cuda), torch.device("cuda"))
        engine = dataclasses.replace(self.build(lowered), interface=interface)
        pool = ContextPool(LoadedEngine(engine, device.index))
        try:
            results = pool.run([x.to(pool.device) for x in self.tensors])
            found = {**given, **dict(zip(marked, results, strict=True))}
            return {name: found[values[name].name].cpu() for name in names}
        finally:
            pool.close()


# Where a trace is wrong ----------------------------------------------------------------------------------------------


def first_module(
    module: torch.nn.Module, call: Callable[[], Any], tensors: Tensors, graph: torch.fx.GraphModule, disturb: Disturb
) -> Place | None:
    """The first submodule that returns a tensor which no node of the traced graph has, as the module itself runs."""
    results: list[tuple[str, torch.Tensor]] = []

    def keep(path: str) -> Callable[..., None]:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            results.extend((path, x.clone()) for x in tree_leaves(output) if isinstance(x, torch.Tensor))

        return hook

    hooks = [
        m.register_forward_hook(keep(path))
        for path, m in module.named_modules()
        if not isinstance(m, torch.jit.ScriptModule)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    names = [n.name for n in graph.graph.nodes if n.op != "output" and isinstance(n.meta.get("val"), torch.Tensor)]
    traced, moved = (_kept(disturb(roundings, 0, names), tensors) for roundings in (0.0, 1.0))
    for path, result in results:
        if not any(_agrees(result, traced[name], moved[name]) for name in names):
            where = f"module '{path}'" if path else "the module itself"
            return Place(path, None, f"The first module that is traced as something else is {where}.")
    return None


def _agrees(result: torch.Tensor, traced: torch.Tensor, moved: torch.Tensor) -> bool:
    if (result.shape, result.dtype) != (traced.shape, traced.dtype):
        return False
    comparison = Comparison(result, traced)
    comparison.learn(traced, moved, MULTIPLE)
    return comparison.passes()
