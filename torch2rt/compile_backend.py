"""`torch.compile(model, backend="torch2rt")`: the graphs that torch's compiler finds, as engines.

torch's compiler gives a backend the module's weights as plain inputs, and notices neither that their values change nor
that they are replaced. So each call compares them with those that the engine was built with.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch2rt.convert import torch2rt
from torch2rt.errors import InputError, Torch2RTError
from torch2rt.passes.options import SELECTIONS
from torch2rt.passes.selection import items_of
from torch2rt.sizes import is_symbolic

LOGGER = logging.getLogger("torch2rt")
OWN = {"strict": False, "reference": False, "largest": 4, "compare_weights": False}
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
    does not serve, and calls with other weights or numbers than it was built with. When these stay the same for some
    calls, they are converted again. Each such thing is said once through Python's logger `torch2rt`. Results that are
    views of inputs are so here, too. Torch counts no writes through `parameter.data` or numpy, so calls do not see them
    unless `"compare_weights"` is set: write to the parameter itself under `torch.no_grad()`, or call
    `torch.compiler.reset()` afterwards.

    - `options`: arguments of `torch2rt.torch2rt`, where `fallback` is `True` if it is not given, and of its own:
      `"strict": True` raises what stands against a conversion; `"largest": n` is how many times as large as in the
      first call a dynamic size may be, where torch knows no range, 4 by default (`torch._dynamo.mark_dynamic(x, 0,
      min=1, max=8)` gives it one); `"reference": True` evaluates the networks with torch, which needs no GPU;
      `"compare_weights": True` compares every weight with a copy at each call, so that writes of any kind are seen. It
      keeps the weights once more, and each call reads them and waits for the GPU.
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
        placeholders = graph.graph.find_nodes(op="placeholder")
        state = "write" if any(_is_written(node.meta.get("example_value")) for node in placeholders) else "refuse"
        self.options = {"fallback": True, "progress": False, "state": state, **options}
        self.said: set[str] = set()
        self.steps, self.contents = _Steps(), _Contents()
        self.stable, self.new = 0, None
        self.converting = threading.Lock()
        self.examples = [node.meta.get("example_value") for node in placeholders]
        places = range(len(placeholders))
        self.written = [i for i in places if _is_written(self.examples[i])]  # such as a cache, which is an input, then
        self.weights = [i for i in places if _is_weight(placeholders[i]) and i not in self.written]
        self.tensors = [i for i in places if i not in self.weights and not _is_number(self.examples[i])]
        self.sizes = self.where()
        self.numbers = [i for i in places if i not in (*self.weights, *self.tensors, *self.sizes)]
        self.ranges = [_ranges(self.examples[i], int(self.own["largest"])) for i in self.tensors]
        self.views = views_of_inputs(graph)
        self.needs_grad = torch.is_grad_enabled() and any(
            isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
        )
        self.made = _Made(None, None, [])
        if self.needs_grad:
            self.say("a call needs gradients, which an engine has not: it runs in torch. Use torch.no_grad()")
        else:
            handle = register_optimizer_step_post_hook(self.steps)
            weakref.finalize(self, handle.remove)
            # asking torch for the value of a size would fix it
            values = [x.node.hint if isinstance(x, torch.SymInt | torch.SymFloat) else x for x in example_inputs]
            self.count_writes(values)
            self.convert(values)

    @property
    def converted(self) -> Any:
        """The converted graph; `None` where it runs in torch."""
        return self.made.converted

    def say(self, text: str) -> None:
        """Say something once."""
        if text not in self.said:
            self.said.add(text)
            LOGGER.warning("torch.compile: %s.", text)

    def convert(self, values: Sequence[Any]) -> None:
        """Build an engine with the weights of this call; without one, the graph runs in torch."""
        key, held = self.key_of(values), [values[i] for i in self.weights]
        self.made, self.stable = _Made(key, None, held), 0
        inputs = [values[i].detach() if isinstance(values[i], torch.Tensor) else values[i] for i in self.tensors]
        try:
            self.check(inputs, held)
            constants = {i: values[i] for i in (*self.weights, *self.numbers)}
            graph = self.graph if self.views is None else self.views.rest
            module = _WithWeights(graph, constants, self.tensors, self.sizes)
            shapes = {
                "min_shapes": [low or tuple(x.shape) for x, (low, _) in zip(inputs, self.ranges, strict=True)],
                "opt_shapes": [tuple(x.shape) for x in inputs],
                "max_shapes": [high or tuple(x.shape) for x, (_, high) in zip(inputs, self.ranges, strict=True)],
            }
            converted = torch2rt(module.eval(), inputs, **{**shapes, **self.options})
            if getattr(converted, "state", None):
                raise InputError("it updates running statistics, which torch does not count as writes")
            self.made = _Made(key, converted.reference() if self.own["reference"] else converted, held)
        except (Torch2RTError, RuntimeError) as error:
            if self.own["strict"]:
                raise
            self.say(f"a graph runs in torch: {error}")

    def check(self, inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> None:
        """Raise `InputError` for what no engine is for."""
        if not all(isinstance(x, torch.Tensor) for x in inputs) or not inputs:
            raise InputError("the graph has inputs that are no tensors, or none at all")
        if self.views is not None and self.views.rest is None:
            raise InputError("its results share memory with each other or with its inputs, and an engine's do not")
        if any(weight.is_inference() for weight in weights):
            raise InputError("its weights were made in inference mode, in which torch does not count writes to them")
        if self.own["reference"]:
            return
        if not torch.cuda.is_available():
            raise InputError("there is no GPU to run an engine")
        devices = sorted({str(x.device) for x in (*inputs, *weights)})
        if len(devices) > 1 or not devices[0].startswith("cuda"):
            raise InputError(f"an engine runs on one GPU, and the graph's tensors are on {' and '.join(devices)}")

    def where(self) -> dict[int, tuple[int, int]]:
        """For each size among the inputs that a tensor has, that tensor and the dimension."""
        found = {}
        for index, example in enumerate(self.examples):
            for position, tensor in enumerate(self.tensors if isinstance(example, torch.SymInt) else ()):
                for axis, size in enumerate(getattr(self.examples[tensor], "shape", ())):
                    if is_symbolic(size) and size.node.expr == example.node.expr:
                        found[index] = position, axis
        return found

    def key_of(self, values: Sequence[Any]) -> Any:
        """What tells the weights and numbers of one call from those of another."""
        weights = [values[i] for i in self.weights]
        versions = [-1 if w.is_inference() else w._version for w in weights]
        places = [(id(w), w.data_ptr(), version) for w, version in zip(weights, versions, strict=True)]
        return places, [float(values[i]) for i in self.numbers], self.steps.count, self.contents.count

    def count_writes(self, values: Sequence[Any]) -> None:
        """Look at the weights themselves, if that is asked for."""
        if self.own["compare_weights"]:
            self.contents.look_at([values[i].detach() for i in self.weights])

    def is_written_elsewhere(self, values: Sequence[Any]) -> bool:
        """Whether what the graph writes to an input is seen through another one, which an engine would not know."""
        tensors = (values[i] for i in (*self.tensors, *self.weights) if isinstance(values[i], torch.Tensor))
        count = collections.Counter(x.untyped_storage().data_ptr() for x in tensors)
        return any(count[values[i].untyped_storage().data_ptr()] > 1 for i in self.written)

    def __call__(self, *values: Any) -> Any:
        if self.needs_grad:
            return self.graph(*values)
        self.count_writes(values)
        made = self.made
        if (self.weights or self.numbers) and (key := self.key_of(values)) != made.key:
            if key != self.new:
                self.new, self.stable = key, 0
            self.stable += 1
            if self.stable < STABLE or made.converted is None or not self.converting.acquire(blocking=False):
                self.say("weights or numbers have changed, and calls run in torch until they stay the same")
                return self.graph(*values)
            try:
                self.convert(values)
            finally:
                self.converting.release()
            made = self.made
            if made.key != key:
                return self.graph(*values)
        if made.converted is None or self.written and self.is_written_elsewhere(values):
            return self.graph(*values)
        tensors = [values[i] for i in self.tensors]
        try:
            made.converted._interface().check([tuple(x.shape) for x in tensors], [x.dtype for x in tensors])
        except InputError as error:
            self.say(f"calls of other sizes run in torch: {error}")
            return self.graph(*values)
        results = made.converted(*tensors)
        return results if self.views is None else self.views.together(results, values)


class _Made(NamedTuple):
    """An engine, the key of the weights that it was built with, and these: as long as they live, so does their key."""

    key: Any
    converted: Any
    weights: list[torch.Tensor]


class _Steps:
    """Counts the steps of all optimizers, whose fused kernels change weights without a trace."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *arguments: Any) -> None:
        self.count += 1


class _Contents:
    """Counts how often weights had other contents than at the call before, of which copies are kept."""

    def __init__(self) -> None:
        self.count, self.copies = 0, list[torch.Tensor]()
        self.lock = threading.Lock()

    def look_at(self, weights: Sequence[torch.Tensor]) -> None:
        """Compare all of them, bit by bit, with one wait for each device."""
        with self.lock:
            places = range(len(self.copies))
            differ = [(self.copies[i] != _bytes(weights[i])).any() for i in places]
            devices = {found.device for found in differ}
            if not self.copies or any(torch.stack([f for f in differ if f.device == d]).any().item() for d in devices):
                self.count, self.copies = self.count + 1, [_bytes(weight).clone() for weight in weights]


def _bytes(weight: torch.Tensor) -> torch.Tensor:
    return weight.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


class _WithWeights(torch.nn.Module):
    """A graph of torch's compiler as a function of its input tensors, with the weights as parameters of its own."""

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        constants: Mapping[int, Any],
        tensors: Sequence[int],
        sizes: Mapping[int, tuple[int, int]],
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_graph", graph)
        self._numbers = {i: value for i, value in constants.items() if not isinstance(value, torch.Tensor)}
        self._weights = {i: f"weight_{i}" for i in constants if i not in self._numbers}
        self._tensors, self._sizes = list(tensors), dict(sizes)
        for index, name in self._weights.items():
            self.register_buffer(name, constants[index].detach())

    def forward(self, *tensors: torch.Tensor) -> Any:
        values: dict[int, Any] = {index: getattr(self, name) for index, name in self._weights.items()}
        values.update(self._numbers)
        values.update(zip(self._tensors, tensors, strict=True))
        values.update({index: tensors[position].shape[axis] for index, (position, axis) in self._sizes.items()})
        return tuple(self._graph(*(values[index] for index in range(len(values)))))


@dataclasses.dataclass(frozen=True)
class Views:
    """A graph of which some results are views of its inputs or weights, so that they see each other's writes.

    - `are_views`: which results. `views`: the graph with these alone, which torch runs. `rest`: the graph with the
      others; `None` where there are none, or where they share memory with each other.
    """

    are_views: Sequence[bool]
    views: torch.fx.GraphModule
    rest: torch.fx.GraphModule | None

    def together(self, others: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
        """All results in their order: the others, and the views of these inputs."""
        ours, theirs = iter(self.views(*values)), iter(others)
        return tuple(next(ours if is_view else theirs) for is_view in self.are_views)


def views_of_inputs(graph: torch.fx.GraphModule) -> Views | None:
    """How results share memory with inputs, or with each other; `None` where none does.

    >>> views_of_inputs(torch.fx.symbolic_trace(torch.nn.ReLU())) is None
    True
    """
    (output,) = graph.graph.find_nodes(op="output")
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else output.args
    given = {_memory(node) for node in graph.graph.find_nodes(op="placeholder")} - {None}
    memory = [_memory(result) for result in results]
    are_views = [place in given for place in memory]
    others = [place for place in memory if place is not None and place not in given]
    is_written = any(_is_written(node.meta.get("example_value")) for node in graph.graph.find_nodes(op="placeholder"))
    is_shared = len(set(others)) < len(others) or any(are_views) and is_written  # the views would write again
    if not any(are_views) and not is_shared:
        return None
    views = _with_results(graph, are_views)
    views.graph.eliminate_dead_code()
    views.recompile()
    rest = None if is_shared or all(are_views) else _with_results(graph, [not is_view for is_view in are_views])
    return Views(are_views, views, rest)


def _memory(node: Any) -> int | None:
    """What tells the memory of a tensor in the compiler's own run from that of others."""
    value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return value.untyped_storage()._cdata


def _with_results(graph: torch.fx.GraphModule, chosen: Sequence[bool]) -> torch.fx.GraphModule:
    """A copy of a graph with some of its results."""
    copied = torch.fx.Graph()
    results: Any = copied.graph_copy(graph.graph, {})
    copied.output(tuple(result for result, is_chosen in zip(results, chosen, strict=True) if is_chosen))
    return torch.fx.GraphModule(graph, copied)


def _is_weight(node: torch.fx.Node) -> bool:
    """Whether a placeholder is a parameter, a buffer, or another tensor of the module."""
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _is_written(example: Any) -> bool:
    """Whether a graph writes to an input: torch's compiler has run it on this tensor, which was new."""
    return isinstance(example, torch.Tensor) and not example.is_inference() and example._version > 0


def _is_number(example: Any) -> bool:
    """Whether an input is a number: an int, or a float that torch's compiler gives as a tensor, such as an eps."""
    if not isinstance(example, torch.Tensor):
        return isinstance(example, (int, float, torch.SymInt, torch.SymFloat))
    return not example.dim() and example.dtype is torch.float64 and not example.is_cuda


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
