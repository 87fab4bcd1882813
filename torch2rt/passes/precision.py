"""Mixed precision: a traced graph in which products, and what follows them, compute in float16 or bfloat16.

Only values that are float32 change, so a module in half precision stays as it is. Each call is decided in the graph's
order, by the table of `precision_rules`, by what the user says, and by the ranges of its values on samples. A value has
one type, and is cast for those that want it in another; weights are cast once. `meta["precision"]` of a call says why
it computes in the type that it does.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import Node, map_aggregate

from torch2rt.backend.quirks import computes_lone_products_low
from torch2rt.callables import qualified_name
from torch2rt.errors import InputError
from torch2rt.graph import graph_meta, place_of
from torch2rt.network import origin_of
from torch2rt.passes import precision_rules as rules
from torch2rt.passes.copies import add_constant, constant_of, copy_graph, finish
from torch2rt.passes.precision_rules import name_of
from torch2rt.passes.quantization.quantized import dequantize
from torch2rt.passes.ranges import Range, Ranges, tensors_of
from torch2rt.passes.value_numbers import value_sources
from torch2rt.registry import load
from torch2rt.structure import bare_name

HEADROOM = 2.0  # other inputs than the samples may have values larger by this factor
FLOAT = torch.float32


@torch.inference_mode(False)
@torch.no_grad()
def mixed_precision(
    graph: torch.fx.GraphModule,
    low: torch.dtype,
    *,
    keep: Mapping[Node, str] | None = None,
    force: Mapping[Node, str] | None = None,
    ranges: Ranges | None = None,
    io: torch.dtype | None = None,
) -> torch.fx.GraphModule:
    """A graph that computes in `low` (float16 or bfloat16) what the table of `precision_rules` says.

    - `keep`, `force`: calls of `graph` that compute in float32, or in `low`, and the reason for the report.
    - `ranges`: of `measure`, by which calls stay in float32 whose values `low` cannot hold.
    - `io`: the type of floating-point inputs and outputs; their own if it is not given.

    Raises `InputError` where a call that is forced cannot compute in `low`.

    >>> from torch2rt import trace
    >>> graph = mixed_precision(trace(torch.nn.Linear(3, 5), [torch.randn(2, 3)]), torch.float16)
    >>> graph(torch.ones(2, 3))[0].dtype, graph.graph.find_nodes(op="get_attr")[0].meta["val"].dtype
    (torch.float32, torch.float16)
    """
    kept, forced = ({node.name: why for node, why in (chosen or {}).items()} for chosen in (keep, force))
    rewriter = _Rewriter(copy_graph(graph), low, kept, forced, ranges or {}, io)
    rewriter.run()
    return finish(rewriter.module)


class _Rewriter:
    """A copy of a graph whose calls are decided one after the other."""

    def __init__(
        self,
        module: torch.fx.GraphModule,
        low: torch.dtype,
        keep: Mapping[str, str],
        force: Mapping[str, str],
        ranges: Ranges,
        io: torch.dtype | None,
    ) -> None:
        self.module, self.graph, self.low, self.io = module, module.graph, low, io
        self.keep, self.force, self.ranges = keep, force, ranges
        self.limit, self.tiny = torch.finfo(low).max / HEADROOM, torch.finfo(low).tiny
        self.float = {node for node in self.graph.nodes if any(t.dtype is FLOAT for t in tensors_of(node))}
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.weak: set[Node] = set()  # constants, and what is computed of nothing else
        self.kept: dict[str, list[str]] = {}  # reasons by place, for the report
        self.registry = load()

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node in self.float and self.io is not None:
                node.meta["val"] = self.retyped(node.meta["val"], self.io)
            elif node.op == "get_attr":
                self.weak.add(node)
            elif node.op == "call_function" and "val" in node.meta:
                sources = value_sources(node, self.registry)
                if all(source in self.weak for source in sources):
                    self.weak.add(node)
                self.call(node)
        self.outputs()
        for node in self.graph.find_nodes(op="call_function", target=dequantize):
            if not node.users:  # it was wanted in another type
                self.graph.erase_node(node)
        self.guard_lone_products()
        self.describe()

    # Deciding ---------------------------------------------------------------------------------------------------------

    def call(self, node: Node) -> None:
        """Decide one call, and cast its arguments."""
        arguments = [n for n in node.all_input_nodes if n in self.float]
        if node.target is operator.getitem and isinstance(node.args[0].meta["val"], (tuple, list)):  # type: ignore
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr,index]
            if node.args[0] in self.weak:
                self.weak.add(node)
            return
        if not arguments and node not in self.float:
            return
        if rules.name_of(node.target) in rules.CONVERSIONS and _says_dtype(node):
            return  # whatever the type of what it converts
        is_low, reason = self.decide(node, arguments)
        node.meta.setdefault("precision", reason)
        dtype = self.low if is_low else FLOAT
        wide = self.wide_arguments(node) if is_low else set()

        def convert(item: Any) -> Any:
            return self.cast(item, dtype) if isinstance(item, Node) and item in self.float else item

        if wide:
            bound = self.arguments(node)
            node.args = ()
            node.kwargs = {k: v if k in wide else map_aggregate(v, convert) for k, v in bound.items()}
        else:
            node.args, node.kwargs = map_aggregate(node.args, convert), map_aggregate(node.kwargs, convert)  # type: ignore
        if is_low:
            node.meta["val"] = map_aggregate(node.meta["val"], lambda x: self.retyped(x, self.low))

    def decide(self, node: Node, arguments: Sequence[Node]) -> tuple[bool, str]:
        """Whether a call computes in the narrow type, and why."""
        name = name_of(node.target)
        computed = [n for n in arguments if n not in self.weak]
        follows = bool(computed) and all(dtype_of(n) is self.low for n in computed)
        integers = name in rules.ARITHMETIC and any(_is_integer(n) for n in node.all_input_nodes)
        others = {t.dtype for n in node.all_input_nodes for t in tensors_of(n)} - {FLOAT, self.low, torch.bool}
        blocked = self.obstacle(node, arguments)
        if node.name in self.keep:
            if node.name in self.force:
                raise InputError(f"{self.words(node)}: {self.keep[node.name]} and {self.force[node.name]}.")
            return False, self.keep[node.name]
        if node.name in self.force:
            if name not in rules.LOW | rules.ARITHMETIC | rules.FOLLOW | rules.FORCEABLE or _says_dtype(node):
                raise InputError(
                    f"{self.force[node.name]}: {self.words(node)} cannot compute in {bare_name(self.low)}."
                )
            if blocked:
                raise InputError(f"{self.force[node.name]}: {self.words(node)} would be wrong: {blocked}.")
            return True, self.force[node.name]
        if name not in rules.LOW | rules.ARITHMETIC | rules.FOLLOW or _says_dtype(node) or self.is_passed_whole(node):
            return False, "computes in float32" if name else "not known to be safe"
        if any(dtype.is_floating_point or dtype.is_complex for dtype in others):
            return False, f"{bare_name(others.pop())} is among its arguments"
        if node in self.weak and name != "embedding":
            return False, "constant"
        if name not in rules.LOW and (not follows or integers):
            return False, "an integer is among its arguments" if follows else "its arguments are float32"
        if blocked:
            self.kept.setdefault(place_of(node).strip(), []).append(f"{qualified_name(node.target)}, {blocked}")  # type: ignore
            return False, blocked
        return True, "a product" if name in rules.LOW else "its arguments are narrow"

    def obstacle(self, node: Node, arguments: Sequence[Node]) -> str | None:
        """Why a call's values do not fit the narrow type, if they do not."""
        low, wide = bare_name(self.low), self.wide_arguments(node)
        addend = rules.ADDENDS.get(name_of(node.target))
        values = self.arguments(node) if wide or addend else {}
        exempt = {n for name in wide if isinstance(n := values.get(name), Node)}
        added = values.get(addend) if addend else None
        for number in _numbers(node):
            if math.isfinite(number) and abs(number) > torch.finfo(self.low).max:
                return f"its number {number:g} overflows {low}"
            if number and abs(number) < self.tiny:
                return f"its number {number:g} vanishes in {low}"
        for argument in arguments:
            constant = constant_of(self.module, argument)
            if argument in exempt:
                continue
            if constant is not None and constant.numel():
                most = torch.where(constant.isfinite(), constant.abs(), 0).amax()
                # one answer is read, and not the numbers: other weights that fit as well can take the place of these
                if bool((most > torch.finfo(self.low).max) | (most > 0) & (most < self.tiny)):
                    found = Range()
                    found.add(constant)
                    if argument is added and self.is_lost_in_rounding(found, node):
                        continue
                    verb = "overflows" if found.largest > 1 else "vanishes in"
                    return f"its constant {argument.target} of up to {found.largest:.3g} {verb} {low}"
            elif dtype_of(argument) is FLOAT and (why := self.misfit(argument.name)):
                return f"an argument {why}"
        for name, of in ((node.name, "a result"), (f"{node.name}:scores", "the product of queries and keys")):
            if why := self.misfit(name):
                return f"{of} {why}"
        return next(
            (
                f"a result {why}"
                for user in node.users
                if user.target is operator.getitem and (why := self.misfit(user.name))
            ),
            None,
        )

    def is_lost_in_rounding(self, addend: Range, node: Node) -> bool:
        """Whether what is added to a product is smaller than what is lost by rounding the call's results."""
        result = self.ranges.get(node.name)
        return result is not None and addend.largest <= result.largest * torch.finfo(self.low).eps

    def misfit(self, name: str) -> str | None:
        """Why the values of a node on the samples do not fit the narrow type."""
        found = self.ranges.get(name)
        if found is None:
            return None
        if found.largest > self.limit:
            return f"of up to {found.largest:.3g} on the samples overflows {bare_name(self.low)}"
        if 0 < found.largest < self.tiny:
            return f"of at most {found.largest:.3g} on the samples vanishes in {bare_name(self.low)}"
        return None

    def is_passed_whole(self, node: Node) -> bool:
        """Whether a call has several results and another call takes them all."""
        return isinstance(node.meta["val"], (tuple, list)) and any(u.target is not operator.getitem for u in node.users)

    def wide_arguments(self, node: Node) -> frozenset[str]:
        return rules.WIDE_ARGUMENTS.get(name_of(node.target), frozenset())

    def arguments(self, node: Node) -> dict[str, Any]:
        """The arguments of a call by name, those that are given."""
        converter = self.registry.find(node.target)  # type: ignore[arg-type]
        assert converter is not None  # of the calls in `WIDE_ARGUMENTS`
        args, kwargs = converter.bind(node.args, dict(node.kwargs), node.target)  # type: ignore[arg-type]
        return {**dict(zip((p.name for p in converter.parameters), args, strict=False)), **kwargs}

    def words(self, node: Node) -> str:
        return f"{qualified_name(node.target)} at {place_of(node).strip()}"  # type: ignore[arg-type]

    # Changing ---------------------------------------------------------------------------------------------------------

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """A value in this type: itself, a new constant, or a cast that all who want it share."""
        if dtype_of(node) is dtype:
            return node
        if name_of(node.target) in rules.CONVERSIONS and isinstance(source := node.args[0], Node):
            if dtype_of(source) is dtype is self.low:  # a widening that is taken back
                return source
        if (node, dtype) not in self.casts:
            constant = constant_of(self.module, node)
            if constant is not None:
                made = self._constant(node, constant, dtype)
            else:
                made = self._dequantized(node, dtype) if node.target is dequantize else self._cast(node, dtype)
            self.casts[node, dtype] = made
        return self.casts[node, dtype]

    def _constant(self, node: Node, constant: torch.Tensor, dtype: torch.dtype) -> Node:
        made = add_constant(self.module, f"{node.target}_{bare_name(dtype)}", constant.detach().to(dtype).cpu(), node)
        made.meta["made_of"] = origin_of(node).then(f"cast to {bare_name(dtype)}")
        self.weak.add(made)
        return made

    def _dequantized(self, node: Node, dtype: torch.dtype) -> Node:
        """Quantised weights, brought back into another type by the same scales."""
        with self.graph.inserting_after(node):
            made = self.graph.call_function(dequantize, (*node.args[:-1], dtype))
        made.meta = {**node.meta, "val": self.retyped(node.meta["val"], dtype)}
        return made

    def _cast(self, node: Node, dtype: torch.dtype) -> Node:
        with self.graph.inserting_after(node):
            made = self.graph.call_function(torch.Tensor.to, (node, dtype))
        made.meta = {name: node.meta[name] for name in ("module", "source")}
        made.meta["val"] = self.retyped(node.meta["val"], dtype, (FLOAT, self.low))
        return made

    def retyped(self, value: Any, dtype: torch.dtype, of: tuple[torch.dtype, ...] = (FLOAT,)) -> Any:
        """A recorded value in another type, if it is of one of these."""
        if not isinstance(value, torch.Tensor) or value.dtype not in of:
            return value
        mode = getattr(value, "fake_mode", None)
        if mode is None:
            return value.to(dtype)
        with mode:
            return torch.empty(value.shape, dtype=dtype, device=value.device)

    def outputs(self) -> None:
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        wanted = self.io or FLOAT
        output.args = map_aggregate(output.args, lambda n: self.cast(n, wanted) if n in self.float else n)  # type: ignore
        if self.io is not None:
            meta = graph_meta(self.module)
            inputs = [dataclasses.replace(i, dtype=self.io) if i.dtype is FLOAT else i for i in meta.interface.inputs]
            interface = dataclasses.replace(meta.interface, inputs=inputs)
            self.module.meta["torch2rt"] = dataclasses.replace(meta, interface=interface)

    def guard_lone_products(self) -> None:
        """Keep in float32 what TensorRT would compute in the type of the casts around it.

        A number too small to change the result is added: TensorRT then has an addition in float32 behind the product.
        """
        made = set(self.casts.values())
        for node in list(self.graph.nodes):
            if name_of(node.target) not in rules.PRODUCTS or dtype_of(node) is not FLOAT or node in self.weak:
                continue
            users = list(node.users)
            if users and all(user in made for user in users) and computes_lone_products_low():
                with self.graph.inserting_after(node):
                    added = self.graph.call_function(torch.add, (node, TINY))
                added.meta = {name: value for name, value in node.meta.items() if name != "origin"}
                for user in users:
                    user.replace_input_with(node, added)

    def describe(self) -> None:
        """Put the calls that stay float32 because of their values into the report."""
        meta = graph_meta(self.module)
        texts = [f"{place}: stays in float32: {reason}" for place, reasons in self.kept.items() for reason in reasons]
        self.module.meta["torch2rt"] = dataclasses.replace(meta, assumptions=(*meta.assumptions, *dict.fromkeys(texts)))


TINY = 2.0**-100


def dtype_of(node: Node) -> torch.dtype | None:
    """The type of a node's recorded value; of several, of the first with a floating-point type."""
    return next((t.dtype for t in tensors_of(node) if t.dtype.is_floating_point), None)


def _is_integer(node: Node) -> bool:
    return any(
        not t.dtype.is_floating_point and t.dtype is not torch.bool and not t.is_complex() for t in tensors_of(node)
    )


def _says_dtype(node: Node) -> bool:
    """Whether a call names the type of its result."""
    given = [*node.args, *node.kwargs.values()]
    by_name = name_of(node.target) in rules.CONVERSIONS - {"to", "type", "_to_copy"}
    return by_name or any(isinstance(item, torch.dtype) for item in given)


def _numbers(node: Node) -> Iterator[float]:
    """The numbers that a call computes with: sizes and dimensions are integers of other calls than arithmetic."""
    name = name_of(node.target)
    arithmetic = name in rules.ARITHMETIC
    if name.endswith("_norm"):  # their epsilon is for statistics, which are float32
        return
    for item in (*node.args, *node.kwargs.values()):
        if isinstance(item, float) or arithmetic and isinstance(item, int) and not isinstance(item, bool):
            yield float(item)
