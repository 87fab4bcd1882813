"""Plugins: layers of one's own in an engine, for TensorRT 10 and 11."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy

from torch2rt.backend.plugins import SIZES, TYPES, TorchCall, create
from torch2rt.backend.tensorrt import has_plugins
from torch2rt.callables import Target
from torch2rt.errors import ConversionError
from torch2rt.registry import REGISTRY
from torch2rt.sizes import Dim, expression, to_json
from torch2rt.structure import bare_name
from torch2rt.vocabulary.context import Context
from torch2rt.vocabulary.plain import dims, dtype_of, refuse
from torch2rt.vocabulary.tensors import materialize

NO_PLUGINS = (
    "Its plugin needs TensorRT 10 or 11, as TensorRT for RTX has no plugins. With fallback=True it stays a torch call"
)


def plugin(*targets: Target, limits: str = "", override: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated creator of plugins for calls of `targets`: torch functions, methods and operators.

    The creator is given a context, and torch's arguments under torch's names, as a converter is. It returns what
    TensorRT's `add_plugin_v3` takes, `(inputs, shape_inputs, plugin)`, where inputs may be weights and numbers, too.
    `torch_plugin` makes all three of a function in torch. A plugin of a library comes from TensorRT's own registry,
    `tensorrt.get_plugin_registry().get_creator(name, version, namespace).create_plugin(...)`.

    TensorRT for RTX has no plugins. There nothing is registered: a converter of `targets`, if there is one, still
    serves them, and without one their calls are refused, or stay torch calls with `fallback=True`.

    `limits`, `override`, and the `ValueError` for targets that have a converter already, are as for
    `torch2rt.converter`.

    >>> import torch
    >>> @torch.library.custom_op("demo::thrice", mutates_args=())
    ... def thrice(x: torch.Tensor) -> torch.Tensor:
    ...     return 3 * x
    >>> _ = thrice.register_fake(lambda x: torch.empty_like(x))
    >>> from torch2rt import plugin, torch_plugin
    >>> @plugin(torch.ops.demo.thrice)
    ... def make(ctx, x):
    ...     return torch_plugin(ctx, "demo.functions:thrice", [x])
    """

    def register(creator: Callable[..., Any]) -> Callable[..., Any]:
        if not has_plugins():
            for target in REGISTRY.vacant(creator.__name__, targets, override):
                REGISTRY.rewrite(NO_PLUGINS, target)
            return creator

        @functools.wraps(creator)
        def convert(ctx: Context, *args: Any, **kwargs: Any) -> Any:
            return add_plugin(ctx, creator.__name__, creator(ctx, *args, **kwargs))

        REGISTRY.converter(*targets, limits=limits, override=override)(convert)
        return creator

    return register


def add_plugin(ctx: Context, name: str, made: Any) -> Any:
    """The results of a plugin that a creator has returned."""
    if not (isinstance(made, tuple) and len(made) == 3 and all(isinstance(x, (list, tuple)) for x in made[:2])):
        refuse(f"{name} returns {type(made).__name__}, and not (inputs, shape_inputs, plugin)")
    inputs, shape_inputs, created = made
    given = [[materialize(ctx, x) for x in group] for group in (inputs, shape_inputs)]
    if not has_plugins():
        refuse("TensorRT for RTX has no plugins")
    layer = ctx.network.add_plugin_v3(*given, created)
    if layer is None:
        refuse(f"TensorRT refuses the plugin of {name}")
    recorded = ctx.out if isinstance(ctx.out, (tuple, list)) else [ctx.out]
    if layer.num_outputs != len(recorded):
        refuse(f"the plugin of {name} has {layer.num_outputs} outputs for {len(recorded)} results")
    outputs = [layer.get_output(index) for index in range(len(recorded))]
    return tuple(outputs) if isinstance(ctx.out, (tuple, list)) else outputs[0]


def torch_plugin(
    ctx: Context, function: str, inputs: Sequence[Any], attributes: Mapping[str, Any] | None = None
) -> tuple[list[Any], list[Any], Any]:
    """What the creator of a plugin returns that calls a function in torch, on the engine's own tensors and stream.

    - `function`: `"package.module:name"`, of a function that every process can import which runs the engine. It takes
      the tensors of `inputs` by position and returns a tensor, or a tuple of them.
    - `inputs`: tensors and weights, float32, float16, bfloat16 or int32.
    - `attributes`: its keyword arguments: numbers, strings, booleans, `None`, and lists and dicts of these.

    The shapes and types of the results are those that were recorded of the call. Engines with such a plugin run without
    CUDA graphs. Raises `ConversionError` for other types, and for sizes that the inputs' do not say.
    """
    tensors = [materialize(ctx, x) for x in inputs]
    recorded = ctx.out if isinstance(ctx.out, (tuple, list)) else [ctx.out]
    for dtype in (*(dtype_of(x) for x in tensors), *(x.dtype for x in recorded)):
        if dtype not in TYPES:
            refuse(f"a plugin in torch takes and returns {', '.join(map(str, TYPES))}, not {dtype}")
    attributes = dict(attributes or {})
    try:
        if json.loads(json.dumps(attributes)) != attributes:
            raise TypeError("they are others as JSON")
    except TypeError as error:
        raise ConversionError(
            f"the attributes of {function} are no numbers, strings, lists and dicts: {error}"
        ) from error
    axes = _axes(ctx, tensors)
    outputs = [(bare_name(x.dtype), [_tree(expression(size), axes) for size in x.shape]) for x in recorded]
    call = TorchCall(function, attributes, [bare_name(dtype_of(x)) for x in tensors], outputs)
    try:
        found = call.callable
    except (ImportError, AttributeError) as error:
        raise ConversionError(f"{function} cannot be imported: {error}") from error
    if not callable(found):
        refuse(f"{function} is not callable")
    return tensors, [], create(call)


def _axes(ctx: Context, tensors: Sequence[Any]) -> dict[sympy.Symbol, Dim]:
    """The axis of an input that has a dynamic size, for each such size."""
    found: dict[sympy.Symbol, Dim] = {}
    for index, tensor in enumerate(tensors):
        for axis, size in enumerate(dims(ctx, tensor)):
            if isinstance(symbol := expression(size), sympy.Symbol):
                found.setdefault(symbol, Dim(index, "", axis, 0, 0))
    return found


def _tree(size: sympy.Basic, axes: Mapping[sympy.Symbol, Dim]) -> Any:
    """A size of a result over the axes of inputs, as JSON."""
    if missing := [str(s) for s in size.free_symbols if s not in axes]:
        refuse(f"the size {size} of a result is no function of its inputs' sizes, none of which is {missing[0]}")
    tree = to_json(size, axes)
    if unknown := [name for name in _operations(tree) if name not in SIZES]:
        refuse(f"TensorRT has no expression for the size {size} of a result ({unknown[0]})")
    return tree


def _operations(tree: Any) -> list[str]:
    return [tree[0], *(name for part in tree[1:] for name in _operations(part))] if isinstance(tree, list) else []
