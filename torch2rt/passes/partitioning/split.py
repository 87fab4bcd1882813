"""Split: the graph of each segment, itself a graph such as `torch2rt.trace` makes, and how values pass between them.

Values have slots: first the inputs of the module, then what the segments give, in their order. A segment that computes
with a dynamic size which none of its input tensors has gets one more input, a *carrier*: a tensor whose only dimension
is of this size and whose values nobody reads. So every segment is a function of tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx.node import Node
from torch.utils._pytree import tree_leaves

from torch2rt.errors import UnsupportedError
from torch2rt.graph import Assumed, GraphMeta, add_input, graph_meta, is_size
from torch2rt.interface import Input, Interface
from torch2rt.passes.copies import assign
from torch2rt.passes.partitioning.claims import in_short, shortened
from torch2rt.passes.partitioning.effects import draws
from torch2rt.passes.partitioning.partition import Segment
from torch2rt.size_choices import extremes
from torch2rt.sizes import Dim, Symbols, describe, evaluate, expression, is_symbolic, to_json

CARRIER = torch.bool
MAX_SIZE = 1024


@dataclass
class Piece:
    """One segment of a graph, cut out.

    - `graph`: its calls, with an interface of tensors in and a tuple of tensors out.
    - `inputs`: where its input tensors come from: a slot; for a carrier the size as JSON, over slots and axes; or
      `["laid out", slot, axes, expanded]` for a value with its axes in memory in this order, the outermost first, and
      with a stride of 0 along those that are `expanded`.
    - `outputs`: the slots that its outputs fill.
    """

    segment: Segment
    graph: torch.fx.GraphModule
    inputs: list[Any]
    outputs: list[int]


@dataclass
class Program:
    """The pieces of a graph in the order in which they run, and the slots of the module's outputs.

    `slots` is how many there are. `names` are those of the values in them, for reports. `checks` are claims about sizes
    that depend on values, as JSON over slots and axes, each in words, or with none if it seems to be always true.
    """

    pieces: list[Piece]
    results: list[int]
    slots: int
    interface: Interface
    names: list[str] = field(default_factory=list)
    checks: list[tuple[Any, str]] = field(default_factory=list)


def split(graph: torch.fx.GraphModule, segments: Sequence[Segment], max_size: int = MAX_SIZE) -> Program:
    """Cut a traced graph into its segments.

    - `max_size`: the largest size that engines are built for where a size depends on values and torch knows no bound.
    """
    return _Splitter(graph, max_size).run(segments)


class _Splitter:
    def __init__(self, graph: torch.fx.GraphModule, max_size: int) -> None:
        self.graph, self.meta, self.max_size = graph, graph_meta(graph), max_size
        placeholders = graph.graph.find_nodes(op="placeholder")
        self.slots: dict[Node, int] = {node: node.meta["input"] for node in placeholders}
        self.size_of: dict[sympy.Symbol, Any] = {}  # the SymInt of each symbol
        self.symbols: dict[sympy.Symbol, Dim] = {}  # by slot and axis
        self.opts: list[dict[sympy.Symbol, int]] = [{} for _ in self.meta.interface.asked_profiles]
        for symbol, dim in self.meta.symbols.items():
            spec = self.meta.interface.inputs[dim.input]
            self.symbols[symbol] = Dim(dim.input, dim.name, dim.axis, spec.min[dim.axis], spec.max[dim.axis])
            for opt, shape in zip(self.opts, spec.opts, strict=True):
                opt[symbol] = shape[dim.axis]
            self.size_of[symbol] = placeholders[dim.input].meta["val"].shape[dim.axis]
        given = [node.meta["unbacked"] for node in graph.graph.nodes if "unbacked" in node.meta]
        self.bounds: dict[sympy.Basic, int | None] = dict(pair for axes in given for pair in axes.values())
        self.claims = list(self.meta.asserted)
        self.ranges: dict[sympy.Symbol, tuple[int, int | None]] = {s: (d.min, d.max) for s, d in self.symbols.items()}
        self.fake_mode = placeholders[0].meta["val"].fake_mode if placeholders else None
        self.device = placeholders[0].meta["val"].device if placeholders else torch.device("cpu")

    def run(self, segments: Sequence[Segment]) -> Program:
        (output,) = self.graph.graph.find_nodes(op="output")
        pieces = [self.piece(segment) for segment in segments]
        constants = [node for node in dict.fromkeys(output.args[0]) if node.op == "get_attr"]  # type: ignore[arg-type, union-attr]
        if constants:
            pieces.append(self.piece(Segment(True, (), (), tuple(constants), {})))
        results = [self.slots[node] for node in output.args[0]]  # type: ignore[index, union-attr]
        names = [node.name for node in self.slots]
        checks = [
            (to_json(claim, self.symbols), self.described(claim))
            for claim in shortened(self.claims, self.ranges)
            if claim.free_symbols <= self.symbols.keys()
        ]
        return Program(pieces, results, len(self.slots), self.meta.interface, names, checks)

    def described(self, claim: sympy.Basic) -> str:
        """A claim in words; none where it is true of all sizes that are tried."""
        short = in_short(claim, self.ranges)
        return "" if short is None else describe(short, self.symbols)

    def piece(self, segment: Segment) -> Piece:
        """Cut out one segment, whose outputs get slots."""
        inside = set(segment.nodes)
        free = self.free_symbols(segment)
        inputs: list[Any] = [self.slots[node] for node in segment.inputs]
        if segment.is_torch and any(draws(node) or _reads_strides(node) for node in segment.nodes):
            inputs = [self.laid_out(node) for node in segment.inputs]
        graph = _Copy(self.graph, inside)
        specs, symbols = [], {}
        for index, node in enumerate(segment.inputs):
            spec = self.spec(node)
            specs.append(spec)
            graph.placeholder(node, index)
            for axis, size in enumerate(node.meta["val"].shape):
                symbol = expression(size) if is_symbolic(size) else None
                if symbol in free and symbol not in symbols:
                    symbols[symbol] = Dim(index, spec.name, axis, self.symbols[symbol].min, self.symbols[symbol].max)
        for symbol in [symbol for symbol in free if symbol not in symbols and symbol in self.symbols]:
            name, dim = f"size_{symbol}", self.symbols[symbol]
            symbols[symbol] = Dim(len(specs), name, 0, dim.min, dim.max)
            with self.fake_mode:  # type: ignore[union-attr]
                value = torch.empty((self.size_of[symbol],), dtype=CARRIER, device=self.device)
            graph.carrier(name, value, len(specs))
            best, *others = ((opt[symbol],) for opt in self.opts)
            specs.append(Input(name, CARRIER, (dim.min,), best, (dim.max,), others=tuple(others)))
            inputs.append(to_json(symbol, self.symbols))
        graph.sizes(symbols, self.size_of)
        for node in segment.nodes:
            graph.copy(node)
        names = _distinct([node.name for node in segment.outputs], {spec.name for spec in specs})
        module = graph.finish(segment.outputs)
        module.meta["torch2rt"] = GraphMeta(_interface(specs, names), symbols, Assumed([], symbols))
        first = len(self.slots)
        for node in segment.outputs:
            self.slots[node] = len(self.slots)
            self.bind(node)
        return Piece(segment, module, inputs, list(range(first, len(self.slots))))

    def bind(self, node: Node) -> None:
        """The sizes that became known with a value.

        Of calls whose results have one size, such as those under one mask, any may be the first to run.
        """
        found = dict(node.meta.get("unbacked", {}))
        for axis, size in enumerate(getattr(node.meta["val"], "shape", ())):
            if is_symbolic(size) and (symbol := expression(size)) in self.bounds:
                found.setdefault(axis, (symbol, self.bounds[symbol]))
        for axis, (symbol, bound) in found.items():
            if symbol in self.symbols:
                continue
            size = node.meta["val"].shape[axis]
            most = self.max_size if bound is None else max(min(bound, self.max_size), 1)
            self.symbols[symbol] = Dim(self.slots[node], node.name, axis, 1, most)
            self.ranges[symbol] = (0, bound)
            for opt in self.opts:
                opt[symbol] = (most + 1) // 2
            self.size_of[symbol] = size
            if expression(size) != symbol:  # torch has concluded what it is
                self.claims.append(sympy.Eq(symbol, expression(size), evaluate=False))

    def laid_out(self, node: Node) -> Any:
        """An input of a segment that looks at strides: with those of the module's own value."""
        slot, value = self.slots[node], node.meta["val"]
        if node.op == "placeholder" or value.layout is not torch.strided:
            return slot
        strides = [evaluate(expression(stride), self.opts[0]) for stride in value.stride()]
        expanded = [axis for axis, size in enumerate(value.shape) if strides[axis] == 0 and not _is_one(size)]
        axes = sorted(range(value.dim()), key=lambda axis: -strides[axis])
        return slot if axes == sorted(axes) and not expanded else ["laid out", slot, axes, expanded]

    def spec(self, node: Node) -> Input:
        """What is known of an input of a segment."""
        if node.op == "placeholder":
            return self.meta.interface.inputs[node.meta["input"]]
        value = node.meta["val"]
        low: list[int] = []
        high: list[int] = []
        opts: list[list[int]] = [[] for _ in self.opts]
        for size in value.shape:
            if is_symbolic(size):
                expr = expression(size)
                first, last = extremes(expr, self.symbols)
                low.append(max(first, 0))
                high.append(max(last, 0))
                for opt, sizes in zip(opts, self.opts, strict=True):
                    opt.append(min(max(int(evaluate(expr, sizes)), low[-1]), high[-1]))
            else:
                for shape in (low, *opts, high):
                    shape.append(int(size))
        best, *others = (tuple(shape) for shape in opts)
        return Input(node.name, value.dtype, tuple(low), best, tuple(high), others=tuple(others))

    def free_symbols(self, segment: Segment) -> list[sympy.Symbol]:
        """The dynamic sizes that the calls of a segment compute with: for an engine, those of what it takes, too."""
        found: dict[sympy.Symbol, None] = {}
        todo: list[Node] = [*segment.nodes, *([] if segment.is_torch else segment.inputs)]
        for node in todo:
            if isinstance(node.meta.get("val"), torch.fx.GraphModule):
                todo += node.meta["val"].graph.nodes
                continue
            for leaf in tree_leaves(node.meta.get("val")):
                sizes = leaf.shape if isinstance(leaf, torch.Tensor) else [leaf]
                for size in filter(is_symbolic, sizes):
                    found.update(dict.fromkeys(sorted(expression(size).free_symbols, key=str)))
            todo += [n for n in node.all_input_nodes if is_size(n) or n.op == "get_attr" and n not in todo]
        return [symbol for symbol in found if symbol in self.symbols]


class _Copy:
    """A graph that calls of another one are copied to."""

    def __init__(self, graph: torch.fx.GraphModule, inside: set[Node]) -> None:
        self.source, self.inside = graph, inside
        self.module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph(), type(graph).__name__)
        self.graph = self.module.graph
        self.copies: dict[Node, Node] = {}
        self.by_symbol: dict[sympy.Symbol, Node] = {}
        self.inputs: list[Node] = []

    def placeholder(self, node: Node, index: int) -> None:
        copy = add_input(self.graph, node.name)
        copy.meta.update(val=node.meta["val"], module=node.meta["module"], source=node.meta["source"], input=index)
        copy.meta["origin"] = node.meta.get("origin", node.name)
        self.copies[node] = copy
        self.inputs.append(copy)

    def carrier(self, name: str, value: torch.Tensor, index: int) -> None:
        copy = add_input(self.graph, name)
        copy.meta.update(val=value, module="", source="", input=index)
        self.inputs.append(copy)

    def sizes(self, symbols: Symbols, size_of: Mapping[sympy.Symbol, Any]) -> None:
        """Nodes for the sizes themselves, read off the inputs."""
        for symbol, dim in symbols.items():
            node = self.graph.call_function(torch.ops.aten.sym_size.int, (self.inputs[dim.input], dim.axis))
            node.meta.update(val=size_of[symbol], module="", source="")
            self.by_symbol[symbol] = node

    def copy(self, node: Node) -> Node:
        """The copy of a call, of a constant or of a step in the arithmetic of sizes, made when first asked for."""
        if (copy := self.copies.get(node)) is not None:
            return copy
        if is_size(node) and "val" in node.meta and (known := self.by_symbol.get(expression(node.meta["val"]))):
            self.copies[node] = known
            return known
        if node.op == "placeholder":
            raise UnsupportedError(
                f"A pass has made a number of a dynamic size of '{node.target}', which a torch call needs. Make the "
                "dimension static, or convert without precision=."
            )
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.source)
            assign(self.module, str(node.target), value)
        for argument in node.all_input_nodes:
            self.copy(argument)
        copy = self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return copy

    def finish(self, outputs: Iterable[Node]) -> torch.fx.GraphModule:
        """The graph module with these outputs."""
        self.graph.output(tuple(self.copy(node) for node in outputs))
        for node in reversed(self.graph.nodes):
            if is_size(node) and not node.users:
                self.graph.erase_node(node)
        self.module.recompile()
        return self.module


def _is_one(size: Any) -> bool:
    return not is_symbolic(size) and int(size) == 1


def _reads_strides(node: Node) -> bool:
    """Whether a call's result depends on how its arguments lie in memory."""
    return "as_strided" in getattr(node.target, "__name__", "")


def _interface(inputs: Sequence[Input], outputs: Sequence[str]) -> Interface:
    """The calling convention of a segment: tensors one after the other in, a tuple of them out."""
    arguments = {"tuple": [{"tuple": [{"leaf": i} for i in range(len(inputs))]}, {"dict": [], "items": []}]}
    leaves = [{"output": i} for i in range(len(outputs))]
    return Interface(
        list(inputs), arguments, [], list(outputs), {"tuple": [{"leaf": i} for i in range(len(outputs))]}, leaves
    )


def _distinct(names: Sequence[str], taken: set[str]) -> list[str]:
    """Names that are not taken yet, made of the given ones."""
    result = []
    for name in names:
        while name in taken:
            name += "_"
        taken.add(name)
        result.append(name)
    return result
