"""Does a graph compute what its module does at sizes where the module takes another path?

Much of what modules ask about sizes changes nothing: an `if batch_size != 1` that expands a tensor, a shortcut for a
batch of one. Where such a region is a few sizes of a dimension, the graph of another region runs there as it is, on
several drawn inputs, and its results are compared with the module's own. So are the results of the graph's network,
which the reference evaluates: where a graph's slice reads beyond the end, torch cuts it off and TensorRT does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch2rt.debug.comparison import MULTIPLE, Comparison
from torch2rt.debug.disturbance import Disturbed
from torch2rt.debug.inputs import LARGE, drawn_values, fitted
from torch2rt.errors import Torch2RTError
from torch2rt.graph import graph_meta
from torch2rt.interface import Interface, Shape
from torch2rt.network import Network
from torch2rt.runtime.reference_module import ReferenceModule
from torch2rt.sizes import evaluate, expression, is_symbolic
from torch2rt.structure import flatten, is_same, unflatten
from torch2rt.tracing.calls.randomness import same_states
from torch2rt.tracing.module_state import ModuleState
from torch2rt.tracing.patches.process_switches import without_compiler, without_logs
from torch2rt.tracing.sizes.regions import Region, Space, Symbol, with_ties
from torch2rt.tracing.sizes.served_sizes import without_claims

FEW = 4  # sizes of a dimension, of which a region may have so many to be compared by values
DRAWN = 2  # inputs that are drawn for each choice of shapes
SHAPES_AT = 8  # choices of sizes at which the shapes of all values are looked at
ATTEMPTS = 4  # runs with roundings that come out otherwise, before a difference counts


class SameValues:
    """Says how a region's graph is known to be right in another region, for `torch2rt.tracing.sizes.coverage.cover`.

    - `module`, `tensors`: what is converted, and the tensors of its example call. `lower`: makes networks of graphs.
    - `compared`: the shapes at which a graph was found to be right, in lists with the region.
    """

    def __init__(
        self, module: torch.nn.Module, tensors: Sequence[torch.Tensor], lower: Callable[[torch.fx.GraphModule], Network]
    ) -> None:
        self.module, self.tensors, self.lower = module, list(tensors), lower
        self._references: dict[int, tuple[Region, ReferenceModule | None]] = {}
        self.compared: list[tuple[Region, list[Shape]]] = []

    def __call__(self, ours: Region, theirs: Region, space: Space) -> str | None:
        """In words, how the graph of `ours` is known to be right at the sizes of `theirs`; `None` if it is not."""
        if not (few := _few_sizes(theirs, space)):
            return None
        of_ours, of_theirs = (graph_meta(region.graph).interface for region in (ours, theirs))
        if of_ours.outputs != of_theirs.outputs or not is_same(of_ours.result, of_theirs.result):
            return None
        chosen = list(_shapes(few, theirs, space, of_theirs))
        if not _has_right_shapes(ours, theirs, space):
            return None
        generator = torch.Generator().manual_seed(0)
        for shapes in chosen:
            for _ in range(DRAWN):
                drawn = [drawn_values(fitted(x, shape), generator) for x, shape in zip(self.tensors, shapes)]
                if not self._is_same(ours, of_ours, drawn):
                    return None
        if not chosen:
            return None
        self.compared += [(theirs, shapes) for shapes in chosen]
        words = (f"{space.symbols[s]} == {' or '.join(map(str, sizes))}" for s, sizes in few.items())
        return f"verified by values at {' and '.join(words)}"

    def _is_same(self, region: Region, interface: Interface, tensors: list[torch.Tensor]) -> bool:
        disturbed: Callable[..., Disturbed] = functools.partial(Disturbed, region.graph)
        shapes = _shapes_of(tensors)
        unwrapped = lambda outputs: flatten(interface.wrap(outputs, shapes), torch.is_tensor, "result")  # noqa: E731
        try:
            expected, form = flatten(self._call(interface, tensors), torch.is_tensor, "result")
            given, given_form = unwrapped(disturbed(0.0)(tensors))
            if not is_same(form, given_form) or list(map(_kind, given)) != list(map(_kind, expected)):
                return False
            reference = self._reference(region)
            computed = unwrapped(reference.outputs(tensors))[0] if reference is not None else []
            if list(map(_kind, computed)) != list(map(_kind, expected)):
                return False
        except Exception:  # the graph or its network cannot run at these sizes, or the module not with such values
            return False
        of_graph, of_network = (
            [Comparison(ours.to(theirs.device), theirs) for ours, theirs in zip(outputs, expected, strict=True)]
            for outputs in (given, computed)
        )
        for attempt in range(ATTEMPTS):
            if all(comparison.passes() for comparison in (*of_graph, *of_network)):
                return all(comparison.doubt is None for comparison in of_graph)
            moved, _ = unwrapped(disturbed(1.0, attempt)(tensors))
            for comparisons in (of_graph, of_network):
                for comparison, before, after in zip(comparisons, given, moved, strict=True):
                    comparison.learn(before, after, MULTIPLE)
        return False

    def _reference(self, region: Region) -> ReferenceModule | None:
        """The network of a region's graph, for all sizes of the range; `None` if there is none."""
        if id(region) not in self._references:
            meta = graph_meta(region.graph)
            graph = torch.fx.GraphModule(region.graph, region.graph.graph)
            graph.meta = {**region.graph.meta, "torch2rt": without_claims(meta)}
            try:
                self._references[id(region)] = region, ReferenceModule(self.lower(graph))
            except Torch2RTError:  # which lowering the region's own variant will raise again
                self._references[id(region)] = region, None
        return self._references[id(region)][1]

    def _call(self, interface: Interface, tensors: list[torch.Tensor]) -> object:
        """What the module returns; it is left as it was."""
        args, kwargs = unflatten(interface.arguments, [x.clone() for x in tensors])
        state = ModuleState(self.module)
        try:
            with torch.no_grad(), same_states(), without_compiler:
                return self.module(*args, **kwargs)
        finally:
            state.restore()


def _has_right_shapes(ours: Region, theirs: Region, space: Space) -> bool:
    """Whether the shapes that a graph's trace has recorded are right in another region: lowering believes them."""
    inside = np.flatnonzero(space.where(theirs.all_claims()))
    symbols = graph_meta(ours.graph).symbols
    for place in inside[:: max(1, len(inside) // SHAPES_AT)][:SHAPES_AT]:
        shapes = _shapes_at(theirs, space, int(place), "opt")
        sizes = {symbol: shapes[dim.input][dim.axis] for symbol, dim in symbols.items()}
        if not _Shapes(ours.graph, sizes).are_right(shapes):
            return False
    return True


class _Shapes(torch.fx.Interpreter):
    """Runs a graph on tensors without values, and compares their shapes with the recorded ones."""

    def __init__(self, graph: torch.fx.GraphModule, sizes: Mapping[sympy.Symbol, int]) -> None:
        super().__init__(graph)
        self.known: dict[Any, Any] = {}
        self.sizes, self.right = sizes, True

    def are_right(self, shapes: Sequence[Shape]) -> bool:
        placeholders = [node.meta["val"] for node in self.module.graph.nodes if node.op == "placeholder"]
        with without_logs(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            inputs = [torch.empty(s, dtype=x.dtype, device=x.device) for x, s in zip(placeholders, shapes, strict=True)]
            try:
                self.run(*inputs)
            except Exception:  # the graph does not run there
                return False
        return self.right

    def run_node(self, node: torch.fx.Node) -> Any:
        result, value = super().run_node(node), node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor):
            self.right = self.right and tuple(result.shape) == tuple(map(self.size, value.shape))
        return result

    def size(self, size: Any) -> Any:
        if not is_symbolic(size):
            return size
        expr = expression(size)
        if expr not in self.known:
            self.known[expr] = evaluate(expr, self.sizes)
        return self.known[expr]


def _kind(x: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return x.dtype, tuple(x.shape)


def _shapes_of(tensors: Sequence[torch.Tensor]) -> list[Shape]:
    return [tuple(x.shape) for x in tensors]


def _few_sizes(region: Region, space: Space) -> dict[Symbol, np.ndarray]:
    """The dimensions of which a region has a few sizes, and these; none where it has many of all."""
    inside = space.where(region.all_claims())
    found = {s: np.unique(sizes[inside]) for s, sizes in space.sizes.items()}
    few = {s: sizes for s, sizes in found.items() if len(sizes) <= FEW and len(sizes) < len(space.symbols[s].sizes)}
    if not space.are_all:  # of samples, only what was traced with one size is known to have one
        few = {symbol: sizes for symbol, sizes in few.items() if symbol in region.fixed}
    return few if math.prod(map(len, few.values())) <= 2 * FEW else {}


def _shapes_at(region: Region, space: Space, point: int, which: str) -> tuple[Shape, ...]:
    """The shapes at a point of a region, and at an end of the ranges of the dimensions that no claim is about."""
    sizes = with_ties({symbol: int(values[point]) for symbol, values in space.sizes.items()}, region.ties)
    shapes = [list(spec.opt) for spec in space.specs]
    for symbol, dim in space.symbols.items():
        shapes[dim.input][dim.axis] = sizes.get(symbol, getattr(space.specs[dim.input], which)[dim.axis])
    return tuple(tuple(shape) for shape in shapes)


def _shapes(few: Collection[Symbol], region: Region, space: Space, interface: Interface) -> Iterator[list[Shape]]:
    """Shapes of a region: all of its few sizes, others small, large and between; no large ones if slow."""
    inside = np.flatnonzero(space.where(region.all_claims()))
    _, combination = np.unique(np.stack([space.sizes[s][inside] for s in few]), axis=1, return_inverse=True)
    each = [inside[combination.reshape(-1) == i] for i in range(combination.max() + 1)]
    chosen = [(points[0], "min") for points in each] + [(points[-1], "max") for points in each]
    chosen += [(each[0][len(each[0]) // 2], "opt"), (each[-1][len(each[-1]) // 3], "opt")]
    found = dict.fromkeys(_shapes_at(region, space, int(point), which) for point, which in chosen)
    for number, shapes in enumerate(found):
        is_small = sum(int(np.prod(shape)) for shape in shapes) <= LARGE
        if (is_small or number < len(each)) and interface.serves(shapes):
            yield list(shapes)
