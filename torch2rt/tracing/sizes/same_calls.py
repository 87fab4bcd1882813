"""Do two paths through a module make the same calls, for the sizes at which it takes one of them?

Calls are the same if their targets and arguments are: constants by their values, sizes if they are equal everywhere in
the region. What does nothing there is left out, such as an `expand` to the shape that a value has, and calls on
constants alone are made. Lowering believes the shapes that a trace has recorded, so these must be the same, too.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx.node import Node

from torch2rt.graph import graph_meta
from torch2rt.passes.copies import constant_of
from torch2rt.passes.value_numbers import content
from torch2rt.sizes import expression, is_symbolic, to_json, values_at
from torch2rt.tracing.sizes.regions import Region, Space, symbol_of

MOST = 1 << 22  # elements of a constant that is computed to be compared
_NOTHING = frozenset({"contiguous", "clone", "detach", "alias"})


@torch.no_grad()
def same_calls(ours: Region, theirs: Region, space: Space) -> str | None:
    """In words, that the graph of `ours` makes the calls of `theirs` at its sizes; `None` if it does not."""
    if any(theirs.fixed.get(symbol) != size for symbol, size in ours.fixed.items()):
        return None  # it was traced for other sizes
    table = _Table(theirs, space)
    expected, given = table.results(theirs.graph, is_traced_here=True), table.results(ours.graph)
    if expected != given or not table.has_right_shapes:
        return None
    return f"the calls are the same where {space.text(theirs.all_claims())}"


class _Table:
    """Numbers for values, equal for equal computations within a region."""

    def __init__(self, region: Region, space: Space) -> None:
        self.region, self.space = region, space
        inside = space.where(region.all_claims())
        self.count = int(inside.sum())
        self.vectors: list[list[Any]] = [list(spec.opt) for spec in space.specs]
        for symbol, sizes in space.sizes.items():
            self.vectors[space.symbols[symbol].input][space.symbols[symbol].axis] = sizes[inside]
        self.known = {(dim.input, dim.axis) for symbol, dim in space.symbols.items() if symbol in space.sizes}
        self.sizes: dict[sympy.Basic, Any] = {}
        self.has_right_shapes = True  # which the other graph has recorded, and lowering believes
        self.numbers: dict[Any, int] = {}
        self.shapes: dict[int, list[Any]] = {}  # of values of the region's own graph
        self.constants: dict[int, torch.Tensor] = {}

    def number(self, key: Any) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def results(self, graph: torch.fx.GraphModule, is_traced_here: bool = False) -> Any:
        """What a graph returns, in numbers, and how the module's result is made of it."""
        meta = graph_meta(graph)
        names = {symbol: symbol_of(dim) for symbol, dim in meta.symbols.items()}
        of: dict[Node, Any] = {}
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op == "output":
                leaves = [
                    leaf if "output" in leaf else self.stored_size(leaf["size"]) for leaf in meta.interface.leaves
                ]
                return [of[n] for n in node.args[0]], leaves, repr(meta.interface.result), list(meta.interface.outputs)
            if is_symbolic(value):
                of[node] = self.size(expression(value).xreplace(names))
            elif node.op == "placeholder":
                of[node] = self.number(("input", node.meta["input"]))
            elif node.op == "get_attr":
                of[node] = self.constant(graph, node)
            elif value is not None:
                of[node] = self.call(node, of)
            if isinstance(value, torch.Tensor) and isinstance(number := of.get(node), int):
                shape = [self.size(expression(size).xreplace(names)) for size in value.shape]
                if is_traced_here:
                    self.shapes[number] = shape
                elif shape != self.known_shape(number):
                    self.has_right_shapes = False
        raise AssertionError("a graph ends with its output")

    def known_shape(self, number: int) -> list[Any] | None:
        """The shape that a value has in the region, if the region's own graph has the value, or it is a constant."""
        if (constant := self.constants.get(number)) is not None:
            return [("size", size) for size in constant.shape]
        return self.shapes.get(number)

    def size(self, expr: sympy.Basic) -> Any:
        """A size, the same for two expressions that are equal everywhere in the region."""
        if expr not in self.sizes:
            self.sizes[expr] = self._size(expr)
        return self.sizes[expr]

    def _size(self, expr: sympy.Basic) -> Any:
        try:
            expr = expr.xreplace({symbol: sympy.Integer(size) for symbol, size in self.region.fixed.items()})
        except ZeroDivisionError:  # nor can the other graph run there
            return "undefined", expr
        if expr.is_Integer:
            return "size", int(expr)
        if expr.is_integer and expr.free_symbols <= self.space.symbols.keys():
            if isinstance(expr, sympy.Mul) and not expr.free_symbols <= self.space.sizes.keys():
                known, other = expr.as_independent(*expr.free_symbols - self.space.sizes.keys(), as_Add=False)
                if known.free_symbols:  # `batch * ((height + 1) // 2)` is `batch * (height // 2)` for even heights
                    return "product", self.size(known), self.size(other)
            return self.stored_size(to_json(expr, self.space.symbols))
        return "expression", expr

    def stored_size(self, tree: Any) -> Any:
        """The same for a stored expression: its value at every point, if the points are all there are."""
        if self.space.are_all and _dims(tree) <= self.known:
            found = values_at(tree, self.vectors, self.count)
            if found is not None and self.count:
                return ("size", int(found[0])) if (found == found[0]).all() else ("sizes", found.tobytes())
        return "stored", repr(tree)

    def constant(self, graph: torch.fx.GraphModule, node: Node) -> int:
        value = constant_of(graph, node)
        if value is None:
            return self.number(("attribute", id(graph), node.target))
        number = self.number(("constant", content(value)))
        if not isinstance(value, torch.nn.Parameter):
            self.constants[number] = value
        return number

    def call(self, node: Node, of: dict[Node, Any]) -> int:
        """The number of a call's result."""
        args, kwargs = (self.frozen(a, of) for a in (node.args, node.kwargs))
        if (same := self.unchanged(node, of)) is not None:
            return same
        if (folded := self.folded(node, of)) is not None:
            number = self.number(("constant", content(folded)))
            self.constants[number] = folded
            return number
        return self.number(("call", node.target, args, kwargs))

    def frozen(self, value: Any, of: dict[Node, Any]) -> Any:
        if isinstance(value, Node):
            return of.get(value, value)
        if isinstance(value, (tuple, list)):
            return tuple(self.frozen(v, of) for v in value)
        if isinstance(value, dict):
            return tuple((k, self.frozen(v, of)) for k, v in sorted(value.items()))
        if isinstance(value, slice):
            return "slice", *(self.frozen(v, of) for v in (value.start, value.stop, value.step))
        if isinstance(value, int) and not isinstance(value, bool):
            return "size", value
        return type(value), repr(value)

    def unchanged(self, node: Node, of: dict[Node, Any]) -> int | None:
        """The number of a call's first operand, where the call gives that."""
        name = getattr(node.target, "__name__", "").split(".")[0].strip("_")
        operand = of.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if name.startswith("upsample_"):
            is_kept = isinstance(operand, int) and self.keeps_size(node, self.known_shape(operand), of)
            return operand if is_kept else None
        if not isinstance(operand, int) or (node.kwargs and name != "pad"):
            return None
        if name in _NOTHING and len(node.args) == 1:
            return operand
        if (shape := self.known_shape(operand)) is None:
            return None
        if name in ("expand", "view", "reshape"):
            rest: Any = node.args[1:]
            given = [
                self.frozen(v, of) for v in (rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest)
            ]
            kept = name == "expand"
            if len(given) == len(shape) and all(
                a == b or (kept and a == ("size", -1)) for a, b in zip(given, shape, strict=True)
            ):
                return operand
        if name == "getitem":
            items = node.args[1] if isinstance(node.args[1], (tuple, list)) else [node.args[1]]
            if all(isinstance(item, slice) and item == slice(None) or item is Ellipsis for item in items):
                return operand
        if name == "pad" and all(self.frozen(v, of) == ("size", 0) for v in node.args[1]):  # type: ignore[union-attr]
            return operand
        return None

    def keeps_size(self, node: Node, shape: list[Any] | None, of: dict[Node, Any]) -> bool:
        """Whether a resize is to the size that its operand has, so that each place is its own neighbour."""
        if shape is None or len(node.args) < 2 or not isinstance(node.args[1], (tuple, list)):
            return False
        given = [self.frozen(size, of) for size in node.args[1]]
        scales = (*node.args[2:], *node.kwargs.values())
        return given == shape[2:] and all(scale is None or isinstance(scale, bool) for scale in scales)

    def folded(self, node: Node, of: dict[Node, Any]) -> torch.Tensor | None:
        """The result of a call on constants and plain sizes."""

        def plain(value: Any) -> Any:
            if isinstance(value, Node):
                found = of[value]
                if isinstance(found, int):
                    return self.constants[found]
                if found[0] == "size":
                    return found[1]
                raise KeyError
            if isinstance(value, (tuple, list)):
                return type(value)(map(plain, value))
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, slice):
                return slice(*map(plain, (value.start, value.stop, value.step)))
            return value

        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or not node.all_input_nodes:
            return None
        try:
            result = node.target(*plain(node.args), **plain(node.kwargs))  # type: ignore[operator]
        except (KeyError, RuntimeError, TypeError, ValueError, IndexError):
            return None
        return result if isinstance(result, torch.Tensor) and result.numel() <= MOST else None


def _dims(tree: Any) -> set[tuple[int, int]]:
    if not isinstance(tree, list):
        return set()
    if tree[0] == "dim":
        return {(tree[1], tree[2])}
    return set().union(*map(_dims, tree[1:]))
