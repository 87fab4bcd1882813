"""Lower: turn a traced graph into a TensorRT network, call by call."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.fx.node import map_aggregate

from torch2rt.backend.tensorrt import DTYPES, LOG, TORCH_DTYPES, create_builder, create_network, trt
from torch2rt.errors import BuildError, ConversionError, InputError, UnsupportedError
from torch2rt.graph import graph_meta
from torch2rt.interface import AXES
from torch2rt.lowering_errors import NO_CONVERTER, describe_call, kind_of, line_below, list_of, quote, recorded_of
from torch2rt.network import Network, origin_of
from torch2rt.passes.float64 import as_recorded
from torch2rt.passes.order import Pass, chosen, run
from torch2rt.passes.partitioning.effects import is_random
from torch2rt.python_calls import DrawsFrom
from torch2rt.recipes.replay import Recipes
from torch2rt.recipes.tape import Tape
from torch2rt.registry import Converter, load
from torch2rt.size_choices import counterexample
from torch2rt.sizes import expression, is_symbolic
from torch2rt.tracing.sizes.held_claims import hold
from torch2rt.vocabulary import constant, permute
from torch2rt.vocabulary.context import Complex, Context

NAN = ("keep", "ignore")


def lower(
    graph: torch.fx.GraphModule, *, nan: str = "keep", float64: str = "float32", passes: Iterable[Pass] | None = None
) -> Network:
    """Turn a graph from `torch2rt.trace` into a strongly typed TensorRT network.

    Every layer is named after the module and the call it came from and carries `file:line` as metadata.

    - `nan`: `"keep"` passes a NaN on wherever torch does. TensorRT's own layers for bounds, maxima and minima turn some
      NaNs into numbers; `"ignore"` uses them as they are, where that is faster, for modules that never meet a NaN.
    - `float64`: what becomes of float64 values that reach the outputs only through casts to float32 or less.
      `"float32"` computes them in float32 and says so in the network's `assumptions`; `"refuse"` does not convert them.
    - `passes`: what runs over the graph first, `torch2rt.passes.default(float64)` if it is not given; `[]` for a graph
      that passes have run over. The graph itself stays as it is.

    Raises `UnsupportedError` that lists all calls without a converter or with arguments no converter can honour,
    `BuildError` with TensorRT's own log where it refuses a layer, and `InputError` for another `nan` or `float64`.

    >>> from torch2rt import lower, trace
    >>> lower(trace(torch.nn.ReLU(), [torch.randn(2, 3)])).num_layers
    1
    """
    return lower_with_values(graph, nan=nan, float64=float64, passes=passes)[0]


@torch.inference_mode(False)
@torch.no_grad()  # autograd would keep what weights are computed from
def lower_with_values(
    graph: torch.fx.GraphModule,
    *,
    nan: str = "keep",
    float64: str = "float32",
    passes: Iterable[Pass] | None = None,
    tape: Tape | None = None,
) -> tuple[Network, dict[str, Any]]:
    """`lower`, and the network's tensor for each node of the traced graph that it has one for, by the node's name.

    With a tape, on which this thread records, the network has copies of its weights, and `Network.recipes`.
    """
    if nan not in NAN:
        raise InputError(f"{nan=} is not one of {', '.join(map(repr, NAN))}.")
    graph_meta(graph)
    graph = run(graph, chosen(passes, float64))
    lowering = _Lowering(graph, nan, tape)
    lowering.run()
    if tape is not None:
        numbered = {w.number: w.tensor for w in lowering.lowered.weights.values() if w.number is not None}
        lowering.lowered.recipes = Recipes.of(tape, numbered)
        lowering.lowered.tape = None
    values = {
        node.meta["origin"]: value
        for node, value in lowering.values.items()
        if node.graph is graph.graph and "origin" in node.meta and isinstance(value, trt.ITensor)
    }
    lowering.lowered.values = {origin: value.name for origin, value in values.items()}
    return lowering.lowered, values


class _Lowering:
    """One lowering of one graph: the network under construction, and the value of each node so far."""

    def __init__(self, graph: torch.fx.GraphModule, nan: str, tape: Tape | None = None) -> None:
        self.graph, self.registry = graph, load()
        meta, builder = graph_meta(graph), create_builder()
        assumptions = list(meta.assumptions)
        self.lowered = Network(
            create_network(builder), builder, meta.interface, assumptions=assumptions, nan=nan, tape=tape
        )
        self.failures = list(meta.refusals)
        self.network = self.lowered.definition
        self.on_real: tuple[Converter, inspect.BoundArguments]  # the last call on complex numbers, as on real ones
        self.ctx = Context(self.lowered, graph, calls=self)
        self.describe = functools.partial(describe_call, self.registry, meta.symbols)
        self.values: dict[torch.fx.Node, Any] = {}
        self.bug: BaseException | None = None  # the first error in a converter's own Python
        self.failed: set[torch.fx.Node] = set()
        self.refused: dict[str, str] = {}  # the reasons against nodes of the traced graph
        self.named = self.stand_ins = 0
        self.names: dict[str, int] = {}  # how many layers have a stem
        self.given: set[str] = set()

    def run(self) -> None:
        self.lower(self.graph.graph)
        if self.failures:
            raise UnsupportedError(list_of(self.failures), self.refused) from self.bug
        assumed = graph_meta(self.graph).assumed
        self.lowered.interface = hold(assumed.decisions, assumed.ranges, self.lowered.interface)
        self.outputs()

    def lower(self, graph: torch.fx.Graph) -> None:
        """Lower all calls that can be, and keep what is wrong with the others."""
        for node in graph.nodes:
            if node.op == "output" or node in self.values:
                continue
            if self.failed.intersection(node.all_input_nodes):
                self.failed.add(node)
                if "val" in node.meta and node.target is not operator.getitem and not self.registry.find(node.target):  # type: ignore[arg-type]
                    args, kwargs = (map_aggregate(a, recorded_of) for a in (node.args, node.kwargs))
                    self.fail(node, self.describe(node, args, kwargs, NO_CONVERTER))
                continue
            try:
                self.values[node] = self.value(node)
            except UnsupportedError as error:
                self.fail(node, str(error))
                self.named = self.network.num_layers  # what it has left there is not the next call's
                try:
                    self.values[node] = map_aggregate(node.meta["val"], self.stand_in)
                except KeyError:
                    self.failed.add(node)

    def fail(self, node: torch.fx.Node, text: str) -> None:
        """Keep what is wrong with a call; the text is empty where calls in its subgraphs have said it."""
        self.failures += filter(None, [text])
        if node.graph is self.graph.graph and "origin" in node.meta:
            self.refused[node.meta["origin"]] = text or self.failures[-1]

    def stand_in(self, recorded: Any) -> Any:
        """An input of the network for the result of a call that failed, so that later calls are looked at as well.

        `KeyError` for dtypes that TensorRT does not have.
        """
        if not isinstance(recorded, torch.Tensor):
            return recorded
        if recorded.is_complex():
            return Complex(self.stand_in(_real(recorded)), self.stand_in(_real(recorded)))
        sizes = [-1 if is_symbolic(size) else size for size in recorded.shape]
        self.stand_ins += 1
        tensor = self.network.add_input(f"stand_in_{self.stand_ins}", DTYPES[recorded.dtype], sizes)
        return self.ctx.track(tensor, recorded.shape)

    def inline(self, subgraph: torch.fx.GraphModule, *operands: Any) -> list[Any]:
        """The results of a subgraph on these values, as layers of the network."""
        out, of, failures = self.ctx.out, self.ctx.node, len(self.failures)
        *_, output = subgraph.graph.nodes
        placeholders = (node for node in subgraph.graph.nodes if node.op == "placeholder")
        for node, value in zip(placeholders, operands, strict=True):
            self.values[node] = value
        self.lower(subgraph.graph)
        if len(self.failures) > failures:
            raise UnsupportedError("")  # its reasons are listed
        self.ctx.out, self.ctx.node = out, of
        return [self.values[node] for node in output.args[0]]

    def value(self, node: torch.fx.Node) -> Any:
        if node.op == "placeholder":
            return self.input(node)
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.graph)
            if isinstance(value, torch.Tensor):
                self.ctx.origins.record(value, origin_of(node))
            return value
        if "val" not in node.meta or is_symbolic(node.meta["val"]):
            return node.meta.get("val")  # a size, or a step in the arithmetic of one: the vocabulary prints the whole
        args, kwargs = self.resolve(node.args), self.resolve(node.kwargs)
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            if args[0][args[1]] is None:
                call: Any = node.args[0]
                reason = f"its converter gives no result {args[1]} for these arguments"
                raise UnsupportedError(self.describe(call, self.resolve(call.args), self.resolve(call.kwargs), reason))
            return args[0][args[1]]
        if is_random(node) and self.registry.find(node.target) is None:  # type: ignore[arg-type]  # one looks at `training`
            reason = getattr(node.target, "refusal", DrawsFrom.refusal)
            raise UnsupportedError(self.describe(node, args, kwargs, reason))
        if not any(_is_dynamic(leaf) for leaf in _leaves((args, kwargs))) and not self.registry.is_kept(node.target):  # type: ignore[arg-type]
            with torch.no_grad():
                result = as_recorded(node.target(*args, **kwargs), node.meta["val"])  # type: ignore[operator]
            tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if len(tensors) == 1 and isinstance(result, torch.Tensor):
                self.ctx.origins.derive(result, tensors[0], _short(node.target))
            return result
        out = node.meta["val"]
        if isinstance(out, torch.Tensor) and not any(map(is_symbolic, out.shape)) and 0 in out.shape:
            return torch.empty(out.shape, dtype=out.dtype)  # whatever the call, and TensorRT fails at some such layers
        return self.call(node, args, kwargs)

    def resolve(self, args: Any) -> Any:
        return map_aggregate(args, lambda a: self.values[a] if isinstance(a, torch.fx.Node) else a)

    def input(self, node: torch.fx.Node) -> Any:
        spec, sizes = self.lowered.interface.inputs[node.meta["input"]], node.meta["val"].shape
        shape = [-1 if axis in spec.dynamic else size for axis, size in enumerate(spec.opt)]
        tensor = self.network.add_input(spec.name, DTYPES[spec.dtype], spec.in_memory(shape))
        if tensor is None:
            raise BuildError(f"TensorRT refuses the input '{spec.name}' {spec.describe()}.")
        for place, axis in enumerate(spec.axes):
            if axis in spec.dynamic:
                tensor.set_dimension_name(place, str(expression(sizes[axis])))
        self.ctx.track(tensor, spec.in_memory(sizes))
        if spec.memory_format in AXES:
            tensor = permute(self.ctx, tensor, [spec.axes.index(axis) for axis in range(len(shape))])
            self.name_layers(f"{spec.name}.permute", f"as it lies in {spec.memory_format}")
        self.ctx.inputs.append(tensor)
        return tensor

    def call(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        converter = self.registry.find(node.target)  # type: ignore[arg-type]
        if converter is None:
            raise UnsupportedError(self.describe(node, args, kwargs, NO_CONVERTER))
        self.ctx.out, self.ctx.node = node.meta["val"], node
        with LOG.capture() as log:
            try:
                if any(_is_complex(leaf) for leaf in _leaves((args, kwargs, self.ctx.out))):
                    converter = self.on_complex(node, converter, args, kwargs)
                bound_args, bound_kwargs = converter.bind(args, kwargs, node.target)  # type: ignore[arg-type]
                fixed = self.ctx.fixed_sizes()
                result = converter.function(self.ctx, *bound_args, **bound_kwargs)
                if self.ctx.fixed_sizes() != fixed:
                    raise ConversionError("its converter takes a dynamic size for the one that was traced with")
                self.finish(node, result)
            except UnsupportedError:
                raise
            except ConversionError as error:
                raise UnsupportedError(self.describe(node, args, kwargs, quote(str(error), log))) from error
            except Exception as error:
                reason = quote(f"{type(error).__name__}: {error}", log)
                if (line := line_below(error)) is not None:
                    self.bug, reason = self.bug or error, f"{reason} ({line})"
                raise UnsupportedError(self.describe(node, args, kwargs, reason)) from error
        return result

    def on_complex(self, node: torch.fx.Node, converter: Converter, args: Any, kwargs: Any) -> Converter:
        """The converter of a call that takes or returns complex numbers, with what it asks of the context."""
        found = self.registry.find_complex(node.target)  # type: ignore[arg-type]
        if found is None:
            raise ConversionError(
                "there is no converter for it on complex numbers; write it with real and imaginary parts"
            )
        for out in _leaves(self.ctx.out):
            if isinstance(out, torch.Tensor) and out.dtype in (torch.complex32, torch.complex128):
                raise ConversionError(f"its result is {out.dtype}; of complex types, complex64 is supported")
        if found is not converter:
            bound_args, bound_kwargs = converter.bind(args, kwargs, node.target)  # type: ignore[arg-type]
            bound = inspect.signature(converter.function).bind(self.ctx, *bound_args, **bound_kwargs)
            bound.apply_defaults()
            self.on_real = converter, bound
        return found

    @property
    def arguments(self) -> Mapping[str, Any]:
        return self.on_real[1].arguments

    def again(self, **changes: Any) -> Any:
        converter, bound = self.on_real
        call = inspect.BoundArguments(bound.signature, {**bound.arguments, **changes})  # type: ignore[arg-type]
        return self.as_real(converter, call.args[1:], call.kwargs)

    def apply(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return self.as_real(self.registry.find(target), args, kwargs)  # type: ignore[arg-type]

    def as_real(self, converter: Converter, args: Any, kwargs: Any) -> Any:
        """What a converter makes of real values, in the place of the recorded result or of a part of it."""
        recorded, of = self.ctx.out, self.ctx.node
        self.ctx.out, self.ctx.node = map_aggregate(recorded, _real), None
        try:
            return converter.function(self.ctx, *args, **kwargs)
        finally:
            self.ctx.out, self.ctx.node = recorded, of

    def finish(self, node: torch.fx.Node, result: Any) -> None:
        """Name the layers a converter has added, and hold its result against what was recorded."""
        stem = f"{node.meta['module']}.{_short(node.target)}" if node.meta["module"] else _short(node.target)
        self.name_layers(stem, node.meta["source"])
        recorded = node.meta["val"]
        if isinstance(recorded, torch.Tensor):
            self.compare(result, recorded)
        else:
            if not isinstance(result, (tuple, list)):
                raise ConversionError(f"the converter returned {kind_of(result)} for {len(recorded)} results")
            if len(result) != len(recorded):
                raise ConversionError(f"the converter gives {len(result)} results for {len(recorded)}")
            for ours, theirs in zip(result, recorded, strict=True):
                if ours is not None and isinstance(theirs, torch.Tensor):
                    self.compare(ours, theirs)

    def name_layers(self, stem: str, source: str) -> None:
        """Name the layers that were added since the last ones were named."""
        for index in range(self.named, self.network.num_layers):
            layer = self.network.get_layer(index)
            layer.name = self.unused(stem)
            layer.metadata = source
            for output in range(layer.num_outputs):
                tuple(layer.get_output(output).shape)  # a refused layer raises here
        self.named = self.network.num_layers
        self.ctx.name_weights()

    def unused(self, stem: str) -> str:
        """The next name of a stem that no layer has: weights are known by these names."""
        while True:
            count = self.names[stem] = self.names.get(stem, -1) + 1
            name = f"{stem}.{count}" if count else stem
            if name not in self.given:
                self.given.add(name)
                return name

    def compare(self, tensor: Any, recorded: torch.Tensor) -> None:
        if isinstance(tensor, Complex):
            if not recorded.is_complex():
                raise ConversionError(f"the converter gives complex numbers for a result of {recorded.dtype}")
            for part in (tensor.real, tensor.imag):
                self.compare(part, _real(recorded))
            return
        if not isinstance(tensor, (trt.ITensor, torch.Tensor)):
            hint = "layer.get_output(0)" if isinstance(tensor, trt.ILayer) else "a TensorRT tensor"
            raise ConversionError(f"the converter returned {kind_of(tensor)}; it must return {hint}")
        shape = tuple(tensor.shape)
        fits = len(shape) == recorded.dim() and all(
            ours == -1 or self.is_always(theirs, ours) for ours, theirs in zip(shape, recorded.shape, strict=True)
        )
        dtype = torch.uint8 if id(tensor) in self.ctx.bytes else TORCH_DTYPES.get(tensor.dtype, tensor.dtype)
        if not fits or dtype != recorded.dtype:
            raise ConversionError(
                f"the converter gives {tensor.dtype} {shape} for a result of {recorded.dtype} {tuple(recorded.shape)}"
            )
        if isinstance(tensor, trt.ITensor):
            self.ctx.track(tensor, recorded.shape)

    def is_always(self, size: Any, value: int) -> bool:
        """Whether a recorded size is this number, which TensorRT knows it to be.

        Where that follows from relations between dimensions that every call is checked for, it is checked there too.
        """
        if not is_symbolic(size):
            return size == value
        symbols = self.ctx.symbols
        claim = sympy.Eq(expression(size), value)
        if not self.lowered.interface.holds_at_opt(claim, symbols):
            return False
        if counterexample(claim, symbols) is not None:
            self.ctx.constrain(claim)
        return True

    def outputs(self) -> None:
        (output,) = (node for node in self.graph.graph.nodes if node.op == "output")
        for name, node in zip(self.lowered.interface.outputs, output.args[0], strict=True):
            if node.meta["val"].is_complex():
                raise UnsupportedError(
                    f"The output '{name}' is {node.meta['val'].dtype}: TensorRT has no complex numbers. "
                    "Return torch.view_as_real(x), and call torch.view_as_complex on what the engine returns."
                )
        marked: dict[int, Any] = {}  # the tensors stay alive, so their ids stay their own
        for name, node in zip(self.lowered.interface.outputs, output.args[0], strict=True):
            tensor = self.values[node]
            if isinstance(tensor, torch.Tensor):
                try:
                    tensor = constant(self.ctx, tensor)
                except ConversionError as error:
                    raise UnsupportedError(f"The output '{name}' is the same at every call: {error}.") from error
            if id(tensor) in self.ctx.bytes:
                tensor = self.network.add_cast(tensor, trt.DataType.UINT8).get_output(0)
            if tensor.is_network_input or id(tensor) in marked:
                tensor = self.network.add_identity(tensor).get_output(0)
            marked[id(tensor)] = tensor
            tensor.name = name
            if tensor.name != name:
                raise BuildError(f"TensorRT refuses the output name '{name}'.")
            self.network.mark_output(tensor)
        self.ctx.name_weights()


def _short(target: Any) -> str:
    name = getattr(target, "__name__", str(target))
    return name.split(".")[0].strip("_") or name


def _is_dynamic(value: Any) -> bool:
    return isinstance(value, (trt.ITensor, Complex)) or is_symbolic(value)


def _is_complex(value: Any) -> bool:
    return isinstance(value, (Complex, complex)) or (isinstance(value, torch.Tensor) and value.is_complex())


def _real(recorded: Any) -> Any:
    """What is recorded for the real part of a result."""
    if not isinstance(recorded, torch.Tensor) or not recorded.is_complex():
        return recorded
    with recorded.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(recorded.shape, dtype=recorded.dtype.to_real(), device=recorded.device)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Mapping):
        yield from _leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value
