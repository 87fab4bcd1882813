"""A conversion beside its module, call by call: where does an error arise, and where does it only show?

The traced calls run twice: on their own results, and on those of the network. A call's *total* error is the distance of
the network's value from the module's. Its *own* error is the distance from what torch makes of the network's own values
before it: that is what this call adds, of whatever type it is, given what it was given.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import Node, map_aggregate

from torch2rt.backend.tensorrt import LOG
from torch2rt.callables import qualified_name
from torch2rt.debug.bisection import OfEngine
from torch2rt.engine.build import build
from torch2rt.errors import InputError
from torch2rt.graph import graph_meta
from torch2rt.interface import Interface
from torch2rt.network import Network
from torch2rt.reference.evaluator import Evaluator
from torch2rt.runtime.partitioned.reference import PartitionedReference
from torch2rt.runtime.partitioned.segments import PartitionedModule
from torch2rt.runtime.stateful import StatefulModule
from torch2rt.structure import bare_name

Values = Mapping[str, torch.Tensor]
SHOWN = 20  # modules in a table that is printed


@dataclasses.dataclass(frozen=True)
class Row:
    """One call of the module beside the conversion's value.

    - `module`, `function`, `source`: whose call it is, of what, at which `file:line`. `dtype`: the network's.
    - `low`, `high`: the range of the module's finite values.
    - `error`, `relative`: the largest absolute difference, and the norm of the difference over that of the values.
    - `own`, `own_relative`: the same of the call's own error.
    - `lost`: how many numbers are NaN or infinite where the module's are not, or the other way round.
    """

    module: str
    function: str
    source: str
    dtype: str
    low: float
    high: float
    error: float
    relative: float
    own: float
    own_relative: float
    lost: int


@dataclasses.dataclass(frozen=True)
class Beside:
    """A row for each call, in the order of the calls. It prints as a table of modules, by their own errors.

    `by`: what was compared with the module.
    """

    rows: list[Row]
    by: str

    def modules(self) -> list[Row]:
        """For each module the row of the call with the largest own error, the largest first."""
        worst: dict[str, Row] = {}
        for row in self.rows:
            if row.module not in worst or _rank(row) > _rank(worst[row.module]):
                worst[row.module] = row
        return sorted(worst.values(), key=_rank, reverse=True)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("module", "call", "type", "range", "own error", "relative", "total error", "relative", "NaN, inf")
        ]
        for row in self.modules()[:SHOWN]:
            numbers = (f"{x:.1e}" for x in (row.own, row.own_relative, row.error, row.relative))
            extent = f"{row.low:.3g} to {row.high:.3g}"
            name = row.module or "(the module itself)"
            table.append((name, row.function, row.dtype, extent, *numbers, str(row.lost or "")))
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in table]
        more = len(self.modules()) - SHOWN
        return "\n".join([f"{self.by} beside the module", *lines, *([f"and {more} more modules"] if more > 0 else [])])

    def picture(self, path: Any) -> None:
        """Draw total and own relative errors of the calls, in their order; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure((10, 5), layout="constrained")
        axes = figure.subplots()
        places = range(len(self.rows))
        axes.plot(places, [max(row.relative, 1e-12) for row in self.rows], label="total")
        axes.plot(places, [max(row.own_relative, 1e-12) for row in self.rows], ".", label="own")
        for row in self.modules()[:5]:
            axes.annotate(row.module or row.function, (self.rows.index(row), max(row.own_relative, 1e-12)))
        axes.set(yscale="log", xlabel="call", ylabel="relative error", title=f"{self.by} beside the module")
        axes.legend()
        figure.savefig(path)


def _rank(row: Row) -> tuple[int, float]:
    return row.lost, row.own_relative


def compare(model_trt: Any, inputs: Any, kwargs: Mapping[str, Any] | None = None, *, by: str = "reference") -> Beside:
    """Run a converted module's calls beside those of its conversion; `inputs` and `kwargs` are those of a call.

    Calls of a module in segments that stay torch's have no error of their own. A module with state is compared on the
    state that it has, which stays as it is.

    - `by`: `"reference"` evaluates the network with torch. `"engine"` builds engines that give out the values between,
      some at a time, and needs a GPU.

    Raises `InputError` for a module that was converted with `keep_network=False`, or loaded.

    >>> from torch2rt import torch2rt
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh()).eval()
    >>> x = torch.randn(2, 3)
    >>> [row.module for row in compare(torch2rt(model, [x], precision="fp16"), [x]).rows]
    ['0', '1']
    """
    if by not in ("reference", "engine"):
        raise InputError(f"{by=} is not one of 'reference', 'engine'.")
    args = tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)
    if isinstance(model_trt, StatefulModule):
        model_trt, kwargs = model_trt.converted, {**(kwargs or {}), "state": model_trt.state}
    of = _of_engine if by == "engine" else _of_reference
    if isinstance(model_trt, PartitionedModule):
        traced, tensors, found = _of_segments(model_trt, args, dict(kwargs or {}), of)
    else:
        network, tensors = _serving(model_trt, args, dict(kwargs or {}))
        assert network.traced is not None  # `_serving` has looked
        traced = network.traced
        found = of(network, _in_types_of(network.interface, tensors))
    interface = graph_meta(traced).interface
    side = _Side(traced, found, next((x.device for x in tensors), torch.device("cpu")))
    with torch.no_grad():
        side.run(*_in_types_of(interface, tensors))
    return Beside(side.rows, "the reference" if by == "reference" else "the engine")


def first_difference(
    model_trt: Any,
    inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float | None = None,
    by: str = "reference",
) -> Row | None:
    """The first call whose value is off by more than `tolerance` times the module's largest; `None` if there is none.

    Without a tolerance, the first whose own error is more than 64 roundings of the type that it is computed in.

    >>> from torch2rt import torch2rt
    >>> x = torch.randn(2, 3)
    >>> first_difference(torch2rt(torch.nn.Tanh(), [x]), [x]) is None
    True
    """
    for row in compare(model_trt, inputs, kwargs, by=by).rows:
        largest, dtype = max(abs(row.low), abs(row.high)), getattr(torch, row.dtype)
        if tolerance is not None:
            differs = row.error > tolerance * largest
        else:
            differs = row.own > (64 * torch.finfo(dtype).eps * largest if dtype.is_floating_point else 0)
        if differs or row.lost:
            return row
    return None


def _in_types_of(interface: Interface, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A call's tensors in the dtypes of an interface's inputs."""
    return [x.to(spec.dtype) for x, spec in zip(tensors, interface.inputs, strict=True)]


NOTHING = (
    "Nothing can be compared: this module has no network. Convert it with torch2rt(..., keep_network=True); "
    "a refit lets go of the graph."
)


def _serving(model_trt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Network, list[torch.Tensor]]:
    """The network that serves a call, of several the first that takes its shapes, and the tensors of the call."""
    networks = [n for n in getattr(model_trt, "_networks", []) if n.traced is not None and n.lowered is not None]
    if not networks:
        raise InputError(NOTHING)
    for network in networks:
        tensors = network.interface.tensors(args, kwargs)
        try:
            network.interface.check(
                [tuple(x.shape) for x in tensors], [spec.dtype for spec in network.interface.inputs]
            )
        except InputError:
            if network is networks[-1]:
                raise
            continue
        break
    return network, tensors


def _of_reference(network: Network, tensors: list[torch.Tensor]) -> Values:
    """The network's values, by the names of the traced graph's nodes."""
    with LOG.capture():
        names = list(dict.fromkeys(network.values.values()))
        evaluator = Evaluator(network.definition, network.weights_by_layer(), names)
    specs = network.interface.inputs
    results = evaluator({spec.name: x.permute(spec.axes) for spec, x in zip(specs, tensors, strict=True)})
    return {node: results[name] for node, name in network.values.items()}


def _of_segments(
    model_trt: PartitionedModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    of: Callable[[Network, list[torch.Tensor]], Values],
) -> tuple[torch.fx.GraphModule, list[torch.Tensor], Values]:
    """A module's whole graph, a call's tensors, and the values of all networks, each on what is before it gives."""
    whole = model_trt.kept()
    if whole is None or model_trt.traced is None:
        raise InputError(NOTHING)
    found: dict[str, torch.Tensor] = {}

    def watch(part: Network, given: Sequence[torch.Tensor]) -> None:
        if part.lowered is not None:
            found.update(of(part, list(given)))

    tensors = whole.interface.tensors(args, kwargs)
    PartitionedReference(whole, watch).outputs(_in_types_of(whole.interface, tensors))
    return model_trt.traced, tensors, found


def _of_engine(network: Network, tensors: list[torch.Tensor]) -> Values:
    assert network.lowered is not None  # `compare` has looked
    of = OfEngine(network.lowered, tensors, network.nan, lambda network: build(network, progress=False), [])
    names = [name for name in of.names if name in network.values]
    found: dict[str, torch.Tensor] = {}
    for start in range(0, len(names), of.at_once):
        found.update(of(names[start : start + of.at_once]))
    return found


class _Side(torch.fx.Interpreter):
    """The traced graph on the module's values, and each call again on the network's."""

    def __init__(self, graph: torch.fx.GraphModule, found: Values, device: torch.device) -> None:
        super().__init__(graph)
        self.found, self.device = found, device
        self.actual: dict[Node, Any] = {}
        self.rows: list[Row] = []

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def run_node(self, n: Node) -> Any:
        exact = super().run_node(n)
        if n.op != "call_function":
            self.actual[n] = exact
            return exact
        args, kwargs = (
            map_aggregate(a, lambda x: self.actual[x] if isinstance(x, Node) else x) for a in (n.args, n.kwargs)
        )
        again = n.target(*args, **kwargs)  # type: ignore[operator]
        value = self.found.get(n.name)
        if isinstance(exact, torch.Tensor) and value is not None and value.shape == exact.shape:
            self.actual[n] = value.to(exact.device, exact.dtype)
            if n.target is not operator.getitem:
                self.rows.append(_row(n, value.dtype, exact, again, self.actual[n]))
        else:
            self.actual[n] = again
        return exact


def _row(node: Node, dtype: torch.dtype, exact: torch.Tensor, again: torch.Tensor, actual: torch.Tensor) -> Row:
    total, relative, lost = _distance(actual, exact)
    own, own_relative, _ = _distance(actual, again)
    numbers = exact.abs() if exact.is_complex() else exact.double()
    finite = numbers[numbers.isfinite()]
    low, high = (float(x) for x in torch.aminmax(finite)) if finite.numel() else (0.0, 0.0)
    function = qualified_name(node.target)  # type: ignore[arg-type]
    where = node.meta["module"], function, node.meta["source"], bare_name(dtype)
    return Row(*where, low, high, total, relative, own, own_relative, lost)


def _distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, int]:
    """The largest difference, the norm of all over that of `b`, and how many are finite in one of the two only."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    a, b = a.double(), b.double()
    both = a.isfinite() & b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan())
    lost = int((~both & ~same).sum())
    difference = torch.where(both, a - b, 0.0)
    if not difference.numel():
        return 0.0, 0.0, 0
    scale = float(torch.where(both, b, 0.0).norm())
    norm = float(difference.norm())
    return float(difference.abs().max()), norm / scale if scale else (0.0 if not norm else float("inf")), lost
