"""`torch.compile(model, backend="torch2rt")`: the graphs that torch's compiler finds, as engines.

torch's compiler gives a backend the module's weights as plain inputs, and notices neither that their values change nor
that they are replaced. So each call compares them with those that the engine was built with.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch2rt.convert import torch2rt
from torch2rt.errors import InputError, Torch2RTError
from torch2rt.passes.options import SELECTIONS
from torch2rt.passes.selection import items_of
from torch2rt.sizes import is_symbolic

LOGGER = logging.getLogger("torch2rt")
OWN = {"strict": False, "reference": False, "largest": 4}
STABLE = 3  # calls with the same new weights, after which they are converted again


def backend(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile(model, backend="torch2rt", options={...})` calls with each graph.

    A graph that cannot be converted runs in torch, as do calls that need gradients, calls with sizes that the engine
    does not serve, and calls with other weights than it was built with. When these stay the same for some calls, they
    are converted again. Each such thing is said once through Python's logger `torch2rt`.

    - `options`: arguments of `torch2rt.torch2rt`, where `fallback` is `True` if it is not given, and of its own:
      `"strict": True` raises what stands against a conversion; `"largest": n` is how many times as large as in the
      first call a dynamic size may be, where torch knows no range, 4 by default (`torch._dynamo.mark_dynamic(x, 0,
      min=1, max=8)` gives it one); `"reference": True` evaluates the networks with torch, which needs no GPU.
    - `mode`: torch's own; only `None` and `"default"` mean something here.

    Raises `InputError` for another mode, and for modules in `keep_fp32`, `force_low` and `keep_float`. Use it under
    `torch.no_grad()` or `torch.inference_mode()`.

    >>> compiled = torch.compile(model, backend="torch2rt")  # doctest: +SKIP
    """
    if mode not in (None, "default"):
        raise InputError(f"{mode=} has no meaning for torch2rt. Give options= of torch2rt.torch2rt.")
    given = dict(options or {})
    for name in {*SELECTIONS} & {*given}:
        given[name] = items_of(given[name])
        for item in given[name]:
            if isinstance(item, (str, torch.nn.Module, type)):
                raise InputError(
                    f"{name}: {item!r}: the graphs of torch.compile know no modules. Give torch functions or functions "
                    "of a torch.fx.Node, or convert the module with torch2rt.torch2rt."
                )
    return _Compiled(graph, example_inputs, given)


class _Compiled:
    """One graph: its engine, and torch's own calls for all that the engine is not for."""

    def __init__(self, graph: torch.fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> None:
        self.graph = graph
        self.own = {name: options.pop(name, default) for name, default in OWN.items()}
        self.options = {"fallback": True, "progress": False, **options}
        self.said: set[str] = set()
        self.steps = _Steps()
        self.stable = 0
        placeholders = graph.graph.find_nodes(op="placeholder")
        self.weights = [i for i, node in enumerate(placeholders) if _is_weight(node)]
        self.numbers = [i for i, value in enumerate(example_inputs) if i not in self.weights and _is_number(value)]
        self.sizes = [i for i, node in enumerate(placeholders) if is_symbolic(node.meta.get("example_value"))]
        self.tensors = [i for i in range(len(placeholders)) if i not in (*self.weights, *self.sizes, *self.numbers)]
        self.examples = [node.meta.get("example_value") for node in placeholders]
        self.ranges = [_ranges(self.examples[i], int(self.own["largest"])) for i in self.tensors]
        self.needs_grad = torch.is_grad_enabled() and any(
            isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
        )
        self.converted: Any = None
        self.key: Any = None
        if self.needs_grad:
            self.say("a call needs gradients, which an engine has not: it runs in torch. Use torch.no_grad()")
        else:
            handle = register_optimizer_step_post_hook(self.steps)
            weakref.finalize(self, handle.remove)
            self.convert(example_inputs)

    def say(self, text: str) -> None:
        """Say something once."""
        if text not in self.said:
            self.said.add(text)
            LOGGER.warning("torch.compile: %s.", text)

    def convert(self, values: Sequence[Any]) -> None:
        """Build an engine with the weights of this call; without one, the graph runs in torch."""
        self.key, self.stable = self.key_of(values), 0
        self.converted = None
        module = _WithWeights(
            self.graph, {i: values[i] for i in (*self.weights, *self.numbers)}, self.tensors, self.where()
        )
        inputs = [values[i].detach() if isinstance(values[i], torch.Tensor) else values[i] for i in self.tensors]
        try:
            if not all(isinstance(x, torch.Tensor) for x in inputs) or not inputs:
                raise InputError("the graph has inputs that are no tensors, or none at all")
            shapes = {
                "min_shapes": [low or tuple(x.shape) for x, (low, _) in zip(inputs, self.ranges, strict=True)],
                "opt_shapes": [tuple(x.shape) for x in inputs],
                "max_shapes": [high or tuple(x.shape) for x, (_, high) in zip(inputs, self.ranges, strict=True)],
            }
            if not (torch.cuda.is_available() or self.own["reference"]):
                raise InputError("there is no GPU to run an engine")
            converted = torch2rt(module.eval(), inputs, **{**shapes, **self.options})
            self.converted = converted.reference() if self.own["reference"] else converted
        except (Torch2RTError, RuntimeError) as error:
            if self.own["strict"]:
                raise
            self.say(f"a graph runs in torch: {error}")

    def where(self) -> dict[int, tuple[int, int]]:
        """For each size among the inputs, a tensor and a dimension of it that have this size."""
        found = {}
        for index in self.sizes:
            for position, tensor in enumerate(self.tensors):
                for axis, size in enumerate(getattr(self.examples[tensor], "shape", ())):
                    if is_symbolic(size) and size.node.expr == self.examples[index].node.expr:
                        found[index] = position, axis
        return found

    def key_of(self, values: Sequence[Any]) -> Any:
        """What tells the weights of one call from those of another."""
        weights = [values[i] for i in self.weights]
        versions = [-1 if w.is_inference() else w._version for w in weights]
        places = [(id(w), w.data_ptr(), version) for w, version in zip(weights, versions, strict=True)]
        return places, [float(values[i]) for i in self.numbers], self.steps.count

    def __call__(self, *values: Any) -> Any:
        if self.needs_grad:
            return self.graph(*values)
        if (self.weights or self.numbers) and (key := self.key_of(values)) != self.key:
            if key != getattr(self, "_new", None):
                self._new, self.stable = key, 0
            self.stable += 1
            if self.stable < STABLE or self.converted is None:
                self.say("weights have changed, and calls run in torch until they stay the same")
                return self.graph(*values)
            self.convert(values)
        if self.converted is None:
            return self.graph(*values)
        tensors = [values[i] for i in self.tensors]
        interface = self.converted._interface()
        try:
            interface.check([tuple(x.shape) for x in tensors], [x.dtype for x in tensors])
        except InputError as error:
            self.say(f"calls of other sizes run in torch: {error}")
            return self.graph(*values)
        return self.converted(*tensors)


class _Steps:
    """Counts the steps of all optimizers, whose fused kernels change weights without a trace."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *arguments: Any) -> None:
        self.count += 1


class _WithWeights(torch.nn.Module):
    """A graph of torch's compiler as a function of its input tensors, with the weights as parameters of its own."""

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        weights: Mapping[int, torch.Tensor],
        tensors: Sequence[int],
        sizes: Mapping[int, tuple[int, int]],
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_graph", graph)
        self._weights, self._tensors, self._sizes = dict.fromkeys(weights, ""), list(tensors), dict(sizes)
        for index, weight in weights.items():
            self._weights[index] = name = f"weight_{index}"
            self.register_buffer(name, weight.detach())

    def forward(self, *tensors: torch.Tensor) -> Any:
        values: dict[int, Any] = {index: getattr(self, name) for index, name in self._weights.items()}
        values.update(zip(self._tensors, tensors, strict=True))
        values.update({index: tensors[position].shape[axis] for index, (position, axis) in self._sizes.items()})
        return tuple(self._graph(*(values[index] for index in range(len(values)))))


def _is_weight(node: torch.fx.Node) -> bool:
    """Whether a placeholder is a parameter, a buffer, or another tensor of the module."""
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _is_number(value: Any) -> bool:
    """Whether an input is a Python float that torch's compiler gives as a tensor, such as the eps of a layer."""
    return isinstance(value, torch.Tensor) and not value.dim() and value.dtype is torch.float64 and not value.is_cuda


def _ranges(example: Any, largest: int) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The smallest and the largest shape to serve of an input; `None` for both where it is static."""
    shape = getattr(example, "shape", ())
    if not any(map(is_symbolic, shape)):
        return None, None
    low, high = [], []
    for size in shape:
        if not is_symbolic(size):
            low.append(int(size))
            high.append(int(size))
            continue
        expr, env = size.node.expr, size.node.shape_env
        known = env.bound_sympy(expr)
        hint = int(size.node.hint)
        low.append(max(int(known.lower), 1))
        is_bounded = known.upper.is_finite is not False and known.upper < 2**31
        high.append(max(int(known.upper) if is_bounded else largest * hint, low[-1], hint))
    return tuple(low), tuple(high)
