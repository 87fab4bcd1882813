"""The precision plan: which call of a module computes in which type, and why, before anything is built."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections import Counter
from typing import Any

import torch

from torch2rt.callables import qualified_name
from torch2rt.conversion.fallback import Choice, why_not_whole
from torch2rt.conversion.prepared import Prepared, prepare
from torch2rt.conversion.segmenting import in_low_precision
from torch2rt.convert import torch2rt
from torch2rt.errors import TraceError
from torch2rt.graph import graph_meta
from torch2rt.migration import KEYWORDS, from_torch2trt
from torch2rt.passes.options import Precision
from torch2rt.passes.order import chosen, run
from torch2rt.passes.precision import dtype_of
from torch2rt.passes.quantization.formats import FORMATS
from torch2rt.passes.search import Found
from torch2rt.structure import bare_name
from torch2rt.tracing.source_lines import modules_of
from torch2rt.tracing.trace import Traces, as_arguments, trace, trace_variants


@dataclasses.dataclass(frozen=True)
class Row:
    """A call: the path of its module, its function, `file:line`, the type or the format it computes in, and why."""

    module: str
    function: str
    source: str
    dtype: str
    reason: str


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """What the calls of a module compute in. It prints as a table, a row for each module; `rows` has each call.

    - `changes`: the sentences of `model_trt.report`, such as which calls stay in float32 because of their values.
    - `searches`: of `precision="auto"`, the metric for the numbers of modules that were kept in a wider type: each has
      a `table()`, and a `picture(path)` with matplotlib.
    """

    rows: list[Row]
    changes: list[str]
    searches: list[Found] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        table = [("module", "computes in", "not narrower")]
        for module in dict.fromkeys(row.module for row in self.rows):
            rows = [row for row in self.rows if row.module == module]
            types = ", ".join(f"{count} {dtype}" for dtype, count in Counter(row.dtype for row in rows).items())
            kept = [row for row in rows if row.dtype == "float32" or row.reason.startswith("not quantised")]
            wide = Counter(f"{row.function} ({row.reason})" for row in kept)
            table.append((module or "(the module itself)", types, "; ".join(wide)))
        widths = [max(len(line[column]) for line in table) for column in (0, 1)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in table]
        return "\n".join(lines + [f"{text}" for text in self.changes])


def plan_of(graph: torch.fx.GraphModule) -> PrecisionPlan:
    """The plan of a graph that passes have run over."""
    rows = [
        Row(
            node.meta["module"],
            qualified_name(node.target),  # type: ignore[arg-type]
            node.meta["source"],
            reason if reason in FORMATS else bare_name(dtype_of(node)),
            f"not quantised: {node.meta['not_quantized']}" if "not_quantized" in node.meta else reason,
        )
        for node in graph.graph.nodes
        if node.op == "call_function" and "origin" in node.meta and dtype_of(node) is not None
        for reason in (node.meta.get("precision", "as in the module"),)
    ]
    meta = graph_meta(graph)
    return PrecisionPlan(rows, list(meta.assumptions), list(meta.searches))


def plan_precision(
    module: torch.nn.Module | torch.export.ExportedProgram, inputs: Any, choice: Choice | None = None, **options: Any
) -> PrecisionPlan:
    """What `torch2rt(module, inputs, **options)` would compute in which type, without building anything.

    The options are those of `torch2rt.torch2rt`, and raise what they raise there. `choice`: what is asked of a
    partition, where there may be one: the calls that stay torch calls compute in the module's types.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Softmax(1))
    >>> print(plan_precision(model, [torch.randn(2, 3)], precision="fp16"))
    module  computes in  not narrower
    0       1 float16
    1       1 float32    torch.Tensor.softmax (computes in float32)
    """
    known = inspect.signature(torch2rt).parameters
    if unknown := [name for name in options if name not in known and name not in KEYWORDS]:
        raise TypeError(f"plan() got an unexpected keyword argument {unknown[0]!r}")
    fields = [field.name for field in dataclasses.fields(Precision)]
    keywords = {name: value for name, value in options.items() if name not in known}
    precise = Precision(**from_torch2trt(keywords, {name: options[name] for name in fields if name in options})[0])
    ordered = chosen(options.get("passes"), options.get("float64", "float32"))
    if isinstance(module, torch.export.ExportedProgram):
        module = module.module()
    tracing = {name: options[name] for name in inspect.signature(trace).parameters if name in options}
    graphs = traced_graphs(module, inputs, **tracing, fallback=choice is not None)
    precise = precise.for_engines(graphs, modules_of(module))
    plans = []
    for graph in graphs:
        tensors = graph_meta(graph).interface.tensors(*as_arguments(inputs, options.get("kwargs")))
        nan, whole = options.get("nan", "keep"), Prepared(graph, ordered, module, tensors)
        if choice is not None and (error := why_not_whole(graph, ordered, nan)) is not None and precise.changes:
            made = in_low_precision(whole, precise, choice, error, nan)
        else:
            made = prepare(graph, ordered, precise, module, tensors, is_one_of_several=len(graphs) > 1)
        plans.append(plan_of(run(made.graph, made.passes)))
    return plans[0] if len(plans) == 1 else _joined(plans)


def traced_graphs(module: torch.nn.Module, inputs: Any, **tracing: Any) -> list[torch.fx.GraphModule]:
    """The graph of a module, or those of the engines that serve its range together."""
    try:
        return [trace(module, inputs, **tracing)]
    except TraceError as error:
        graphs: list[torch.fx.GraphModule] = []
        with contextlib.suppress(TraceError), Traces(module, inputs, **{**tracing, "fallback": False}) as traces:
            graphs = [variant.graph for variant in trace_variants(traces)]
        if len(graphs) < 2:
            raise error
        return graphs


def _joined(plans: list[PrecisionPlan]) -> PrecisionPlan:
    """The plans of several engines as one, in which a call that several make is one."""
    counts: Counter[Row] = Counter()
    for plan in plans:
        counts |= Counter(plan.rows)
    changes = dict.fromkeys(text for plan in plans for text in plan.changes)
    return PrecisionPlan([*counts.elements()], [*changes], [found for plan in plans for found in plan.searches])
