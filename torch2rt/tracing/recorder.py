"""The graph of one trace while it is being recorded: its nodes, their places in the user's code, and its sizes.

A `Recorder` knows no tensor's value: which node computes a tensor is for `values.py` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._sympy.interp import sympy_interp

from torch2rt.callables import Target
from torch2rt.errors import TraceError
from torch2rt.registry import load
from torch2rt.sizes import Dim, PythonAlgebra, expression, is_symbolic
from torch2rt.tracing.calls.generators import Generators
from torch2rt.tracing.computed_masks import COUNTED, is_selected
from torch2rt.tracing.memory.constants import Constants
from torch2rt.tracing.memory.tensors import is_wrapped, subclass_of
from torch2rt.tracing.patches.fake_mode import FakeMode
from torch2rt.tracing.sizes.guards import Decisions
from torch2rt.tracing.source_lines import SourceLocation


class UnseenTensorError(TraceError):
    """A tensor came out of calls that went past the tracer."""


class _FakeMode(FakeMode):
    """Runs the calls of one trace on fake tensors, and notices writes of calls that the tracer does not know of."""

    def __init__(self, decisions: Decisions, location: SourceLocation) -> None:
        super().__init__(shape_env=decisions.shape_env, allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.decisions, self.location = decisions, location

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.decisions.is_in_torch and func._schema.is_mutable:
            raise UnseenTensorError(f"{self.location.here()}: {func} was not called in a way that torch2rt sees.")
        with self.decisions.reading_place(func is torch.ops.aten.select.int):
            return super().__torch_dispatch__(func, types, args, kwargs)


class Recorder:
    """The graph of one trace.

    - `location`: where in the user's code the trace is.
    - `symbols`, `decisions`: the dynamic sizes, and what was claimed of them.
    - `constants`: what the graph's `get_attr` nodes stand for.
    - `fallback`: whether what only torch can run is recorded, too, such as draws from `generators`; `unbacked`: also
      results whose sizes depend on values.
    - `has_left_out`: whether there were calls that a trace with `fallback` records, as `GraphMeta` says.
    - `open_calls`: the calls whose bodies are being recorded in their place, outermost first.
    """

    def __init__(self, module: torch.nn.Module, fallback: bool = False, unbacked: bool = False) -> None:
        self.fallback, self.unbacked = fallback, unbacked
        self.registry = load()
        self.graph = torch.fx.Graph()
        self.location = SourceLocation(module)
        self.symbols: dict[sympy.Symbol, Dim] = {}
        self.decisions = Decisions(self.symbols, self.location, unbacked)
        self.fake_mode = _FakeMode(self.decisions, self.location)
        self.constants = Constants(self.graph, module)
        self.generators = Generators(self.graph, module) if fallback else None
        self.open_calls: list[Target] = []
        self.has_left_out = False
        self._sizes: dict[sympy.Basic, torch.fx.Node] = {}

    @contextmanager
    def fake_tensors(self) -> Iterator[None]:
        """A context to run calls of torch's own on fake tensors, which the graph gets nothing of."""
        with self.decisions.in_torch(), self.fake_mode:
            yield

    # Nodes -----------------------------------------------------------------------------------------------------------

    def add_symbol(self, symbol: sympy.Symbol, dim: Dim, traced_size: int, node: torch.fx.Node) -> None:
        """A dynamic size of an input: `node` computes it, and `traced_size` is its size in this trace."""
        self.decisions.traced_sizes[symbol] = traced_size
        self.symbols[symbol] = dim
        self._sizes[symbol] = node

    def note_unbacked(self, value: torch.Tensor, node: torch.fx.Node) -> None:
        """Sizes of a call's result that depend on values: known, from here on, by the result that has them."""
        for axis, size in enumerate(value.shape) if self.unbacked else ():
            expr = expression(size)
            if isinstance(expr, sympy.Symbol) and expr not in self._sizes:
                sym_size = self.graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
                sym_size.meta.update(val=size, module=self.location.module(), source=self.location.line())
                self._sizes[expr] = sym_size
                bound = self.decisions.note_unbacked(expr)
                node.meta.setdefault("unbacked", {})[axis] = expr, bound

    def operand(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.fx.Node]:
        """A new fake tensor of the same type and its node: a placeholder that a subgraph will begin with."""
        fake = self.new_fake(tensor)
        node = self.graph.placeholder("operand")
        node.meta.update(val=fake, module="", source="")
        return fake, node

    def new_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new fake tensor of the same type, also of a constant."""
        with self.fake_tensors(), torch._C.DisableTorchFunction():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def node(
        self, target: Target, args: Any, kwargs: Any, out: Any, like: torch.fx.Node | None = None
    ) -> torch.fx.Node:
        """A new call in the graph, whose result is `out`; it stems from the line at hand, or that of another node."""
        node = self.graph.call_function(target, args, kwargs)
        if like is None:
            node.meta.update(val=out, module=self.location.module(), source=self.location.line())
            if self.open_calls:
                node.meta["function"] = self.open_calls[0]
        else:
            node.meta.update(like.meta, val=out)
        return node

    def constant(self, value: torch.Tensor | torch.fx.GraphModule) -> torch.fx.Node:
        """The node of a parameter, a buffer, a tensor made while tracing, or a subgraph."""
        if isinstance(value, FakeTensor) or is_wrapped(value):
            raise UnseenTensorError(
                f"{self.location.here()}: a tensor that torch made without a call that torch2rt could see reached one "
                "that it sees."
            )
        if (kind := subclass_of(value)) is not None:
            raise TypeError(f"a {kind.__name__} is no constant of an engine")  # `Tracer._open_subclass` says where
        if reason := self.constants.why_forbidden(value):
            raise TraceError(reason)
        return self.constants.node(value)

    def argument(self, value: Any, node_of: Callable[[torch.Tensor], torch.fx.Node] | None = None) -> Any:
        """A call's argument as the graph holds it; `node_of` gives the node of a tensor, by default of a constant."""
        if is_selected(value):
            raise TraceError(f"{self.location.here()}: {COUNTED}.")
        if isinstance(value, torch.Tensor):
            return self.constant(value) if node_of is None else node_of(value)
        if is_symbolic(value):
            return self.size(expression(value), value)
        if isinstance(value, (tuple, list)):
            items = [self.argument(v, node_of) for v in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            return {k: self.argument(v, node_of) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(v, node_of) for v in (value.start, value.stop, value.step)))
        if isinstance(value, torch.fx.GraphModule):
            return self.constant(value)
        if isinstance(value, torch.Generator):
            raise TraceError(self.draws_numbers("a call with a generator"))
        return value

    def size(self, expr: sympy.Basic, value: Any) -> Any:
        """The node that computes a symbolic number from the inputs' sizes, or a plain number if it is one after all."""
        expr = self.decisions.shape_env.replace(expr)
        if expr.is_number or isinstance(expr, sympy.logic.boolalg.BooleanAtom):
            return _PYTHON_TYPES[type(value)](expr)
        if (node := self._sizes.get(expr)) is None:
            one = torch.fx.proxy.GraphAppendingTracer(self.graph)  # torch.sym_max refuses proxies of several
            env = {s: torch.fx.Proxy(n, one) for s, n in self._sizes.items() if isinstance(s, sympy.Symbol)}
            node = sympy_interp(PythonAlgebra, env, expr).node
            node.meta.update(val=value, module=self.location.module(), source=self.location.line())
            self._sizes[expr] = node
        return node

    def now(self) -> Any:
        """The graph as it is now, for `back_to`."""
        return next(iter(reversed(self.graph.nodes)), None), dict(self._sizes)

    def back_to(self, then: Any) -> None:
        """Remove the calls that were recorded since then: they belong to a body that could not be recorded."""
        last, self._sizes = then[0], dict(then[1])
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            if node.op == "call_function":
                self.graph.erase_node(node)

    # Errors ----------------------------------------------------------------------------------------------------------

    def draws_numbers(self, what: str, func: Target = torch.randn) -> str:
        """The message against a call that draws random numbers."""
        return f"{self.location.here()}: {what} draws random numbers. {self.registry.advice(func, torch.randn)}."


_PYTHON_TYPES: dict[type, Any] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
