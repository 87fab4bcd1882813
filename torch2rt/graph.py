"""The value that passes from tracing through the passes to lowering: a `torch.fx.GraphModule` of torch calls.

`graph.meta["torch2rt"]` is a `GraphMeta`. The graph has one placeholder per input tensor, one `get_attr` node per
constant (a parameter, a buffer, or a tensor that was made while tracing), one `call_function` node per torch call, and
an output that is a flat tuple of nodes. No tensor stands in a node's arguments. Each node has as `node.meta`:

- `val`: the recorded value: a fake tensor with symbolic sizes, or a tuple of such; the real tensor or the subgraph of a
  constant; the `SymInt` of a node that computes a size. A node that computes a size may use nodes without metadata,
  which are the steps of its arithmetic.
- `module`: the path of the module that makes the call, `""` for the root.
- `source`: the user's line, as `file:line`.
- `input`: of placeholders, the index of the input in the interface.
- `function`: the torch function that was opened, where the call comes from its body.
- `made_of`: of constants that a pass has computed, the `torch2rt.network.Origin` they have.
- `unbacked`: of calls whose results have sizes that depend on values, by axis the symbol of the size and the
  largest that torch knows of, or `None`. Only `torch2rt.trace(..., fallback=True)` records such calls.
- `origin`: the name of the node of the traced graph whose value this is. Nodes that a pass adds have none, unless they
  take the place of a traced node.

`check_graph` says whether a graph keeps to that.

Saving: torch.fx pickles the code and the constants of a graph module, and `graph.meta`, but no node's metadata. A
graph that was loaded can be printed and run; to lower it, trace it again. torch.fx cannot load code that calls methods
of tensors, such as `Tensor.view`: save such a graph as `torch.export.save(torch.export.export(graph, inputs), file)`.
"""

from __future__ import annotations

import builtins
import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx.node import Node

from torch2rt.errors import InputError, TraceError
from torch2rt.interface import Interface
from torch2rt.sizes import Symbols, evaluate, expression, is_symbolic


@dataclasses.dataclass(frozen=True)
class Decision:
    """One claim about sizes and the place that made it."""

    claim: sympy.Basic
    place: str
    internal: bool
    assumed: bool = False  # torch knew it of sizes from 2 on, and did not ask
    of_place: bool = False  # that a place which the module reads lies within a tensor


class Split(NamedTuple):
    """A claim that is true for only a part of the range, and the error that says so."""

    decision: Decision
    error: TraceError


class Assumed(NamedTuple):
    """The claims that torch took for granted, because it takes every size to be at least 2; `lower` proves them last.

    They come last because the errors of `lower` say more. `ranges` are the ranges of the sizes in the claims.
    """

    decisions: list[Decision]
    ranges: Symbols


@dataclasses.dataclass(frozen=True)
class GraphMeta:
    """What is known of a traced graph as a whole: `graph.meta["torch2rt"]`.

    - `interface`: the calling convention of the engine to be.
    - `symbols`: which dimension of which input each symbol in a symbolic size stands for.
    - `assumed`: claims about sizes that are still to be proven.
    - `assumptions`: sentences for the report of the conversion, which passes add to.
    - `asserted`: claims about sizes that depend on values, to be checked when these are known.
    - `refusals`: entries of the list in `UnsupportedError`, which passes add where they find what cannot be converted.
    - `splits`: claims that are true for only a part of the interface's ranges, while `trace` looks for paths that cover
      the rest; none in a graph that `trace` returns.
    - `has_left_out`: whether the module makes calls of no result that an engine needs none of, and a trace with
      `fallback` keeps: they draw random numbers, say.
    - `searches`: what `precision="auto"` has found, as `torch2rt.passes.search` has it.
    """

    interface: Interface
    symbols: Symbols
    assumed: Assumed
    assumptions: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    asserted: tuple[sympy.Basic, ...] = ()
    splits: tuple[Split, ...] = ()
    searches: tuple[Any, ...] = ()
    has_left_out: bool = False


def graph_meta(graph: torch.fx.GraphModule) -> GraphMeta:
    """`graph.meta["torch2rt"]`; raises `InputError` for a graph that `torch2rt.trace` has not made."""
    meta = graph.meta.get("torch2rt") if isinstance(graph, torch.fx.GraphModule) else None
    if not isinstance(meta, GraphMeta):
        raise InputError(
            f"Expected a graph from torch2rt.trace, got a {type(graph).__name__} without meta['torch2rt']. "
            "A pass that makes a new torch.fx.GraphModule must copy graph.meta."
        )
    return meta


def add_input(graph: torch.fx.Graph, name: str) -> Node:
    """A new placeholder, whose node is named as the parameter, if that is possible.

    Where a node has another name than its parameter, torch's code begins with `node = parameter`. So neither may be the
    name of another input, as torch's own choice is with inputs `X` and `x`, or `__getitem__` and `getitem`. Nor may a
    parameter have a name that the code needs, such as `torch` or `slice`.

    >>> graph = torch.fx.Graph()
    >>> [add_input(graph, name).target for name in ("X", "x", "__getitem__", "getitem")]
    ['X', 'x', '__getitem__', 'getitem']
    """
    others = graph.find_nodes(op="placeholder")
    names = {text for other in others for text in (other.name, str(other.target))}
    node = graph.create_node("placeholder", name, (), {}, name=name)
    while node.name in names:
        node._rename(f"{node.name}_1")
    if name in names or name in ("torch", "device", "inf", "nan") or (hasattr(builtins, name) and name != "input"):
        node.target = node.name
    return node


def is_size(node: Node) -> bool:
    """Whether a node computes a size, or is a step in the arithmetic of one."""
    return node.op == "call_function" and ("val" not in node.meta or is_symbolic(node.meta["val"]))


def sizes_at_opt(graph: torch.fx.GraphModule, unknown: int = 64) -> Callable[[Any], Any]:
    """What gives a size, or a number made of sizes, at the shapes that an engine is tuned for.

    A size that depends on values is taken for `unknown`.
    """
    meta = graph_meta(graph)
    opt = {symbol: meta.interface.inputs[dim.input].opt[dim.axis] for symbol, dim in meta.symbols.items()}

    def at(value: Any) -> Any:
        if not is_symbolic(value):
            return value
        expr = expression(value)
        return evaluate(expr, {**dict.fromkeys(expr.free_symbols, unknown), **opt})

    return at


def place_of(node: Node) -> str:
    """A call's line and module, as an entry in the list of calls that cannot be converted begins."""
    module = node.meta["module"]
    return f"  {node.meta['source']}" + (f" in {module}" if module else "")


def check_graph(graph: torch.fx.GraphModule) -> None:
    """Raise `InputError` for the first thing in which a graph differs from what this module's docstring describes.

    >>> from torch2rt import trace
    >>> check_graph(trace(torch.nn.ReLU(), [torch.randn(2, 3)]))
    """
    count = len(graph_meta(graph).interface.inputs)
    placeholders = graph.graph.find_nodes(op="placeholder")
    if [node.meta.get("input") for node in placeholders] != list(range(count)):
        raise InputError(f"The graph must have {count} placeholders, with meta['input'] from 0 on, in order.")
    for node in graph.graph.nodes:
        if wrong := _wrong(graph, node):
            raise InputError(f"The graph's node '{node.name}' {wrong}.")


def _wrong(graph: torch.fx.GraphModule, node: Node) -> str | None:
    """What is wrong with a node, if anything is."""
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        return f"is a {node.op} node; torch2rt knows placeholder, get_attr, call_function and output"
    if _holds_tensor(node.args) or _holds_tensor(node.kwargs):
        return "has a tensor among its arguments; make it a get_attr node with torch2rt.passes.add_constant"
    if node.op == "output":
        return None
    if node.op == "get_attr":
        try:
            operator.attrgetter(str(node.target))(graph)
        except AttributeError:
            return f"stands for the attribute '{node.target}', which the graph module does not have"
    missing = [name for name in ("val", "module", "source") if name not in node.meta]
    if missing == ["val", "module", "source"] and _is_step(node):
        return None
    return f"has no {' and no '.join(f'meta[{name!r}]' for name in missing)}" if missing else None


def _is_step(node: Node) -> bool:
    """Whether a node is used for sizes only, as a step in the arithmetic of one is."""
    return node.op == "call_function" and all(
        is_symbolic(user.meta["val"]) if "val" in user.meta else user.op == "call_function" for user in node.users
    )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, slice):
        return any(map(_holds_tensor, (value.start, value.stop, value.step)))
    return isinstance(value, torch.Tensor)
