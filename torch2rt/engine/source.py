"""A graph that was lowered, as JSON and tensors, of which its engine can be built again by another TensorRT.

Nothing is pickled, and no name of a file is imported: a call is named as `qualified_name` has it, and only callables
that have a converter, operators of torch that are converted as those, and the arithmetic of sizes are found by name.
"""

from __future__ import annotations

import dataclasses
import keyword
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.callables import qualified_name
from torch2rt.errors import EngineError
from torch2rt.graph import add_input, is_size
from torch2rt.passes.copies import assign
from torch2rt.registry import load
from torch2rt.structure import bare_name

_OPERATORS = "add sub mul floordiv truediv mod pow neg pos abs eq ne lt le gt ge and_ or_ not_ getitem".split()
_OF_SIZES = "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum".split()
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"torch.{name}": getattr(torch, name) for name in _OF_SIZES if hasattr(torch, name)},
}
_NAMES = {function: name for name, function in _ARITHMETIC.items()}
_SIZE = "torch.ops.aten.sym_size.int"
_PLAIN = (type(None), bool, int, str)
_KINDS = (torch.dtype, torch.memory_format, torch.layout)


def encode(graph: torch.fx.GraphModule) -> tuple[list[Any], list[torch.Tensor]]:
    """A graph as JSON values and the tensors that they number; raises `EngineError` for what cannot be said so."""
    tensors: list[torch.Tensor] = []
    seen: dict[Any, int] = {}
    table = _table()

    def number(tensor: torch.Tensor) -> int:
        place = (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())
        if not tensor.numel() or place not in seen:
            tensors.append(tensor.detach())
            seen[place] = len(tensors) - 1
        return seen[place]

    def nodes(module: torch.fx.GraphModule) -> list[Any]:
        needed = needed_nodes(module)
        return [node(module, n) for n in module.graph.nodes if n in needed]

    def node(module: torch.fx.GraphModule, n: Node) -> Any:
        if n.op == "get_attr":
            value = getattr_of(module, n)
            if isinstance(value, torch.fx.GraphModule):
                return [n.name, "subgraph", str(n.target), nodes(value)]
            if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_quantized:
                raise EngineError(f"The graph's constant '{n.target}' cannot be saved.")
            return [n.name, "tensor", str(n.target), number(value)]
        if n.op == "call_function":
            places = [n.meta["module"], n.meta["source"]] if is_value(n) else None
            return [n.name, "call", _name(n, table), argument(list(n.args)), argument(n.kwargs), places]
        return [n.name, n.op, argument(n.args[0]) if n.op == "output" else str(n.target)]

    def argument(value: Any) -> Any:
        if isinstance(value, Node):
            return {"node": value.name}
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            return value
        if isinstance(value, (float, complex)):
            return {type(value).__name__: repr(value)}
        if isinstance(value, (tuple, list)):
            return {"tuple" if isinstance(value, tuple) else "list": list(map(argument, value))}
        if isinstance(value, dict):
            return {"dict": [[argument(k), argument(v)] for k, v in value.items()]}
        if isinstance(value, slice):
            return {"slice": [argument(part) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, _KINDS):
            return {type(value).__name__: bare_name(value)}  # type: ignore[arg-type]
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if value is Ellipsis:
            return {"ellipsis": None}
        raise EngineError(f"The graph has {value!r} among the arguments of a call, which cannot be saved.")

    return nodes(graph), tensors


def needed_nodes(graph: torch.fx.GraphModule) -> set[Node]:
    """A graph's placeholders and output, and what these are computed from: passes may leave calls that nobody uses."""
    needed: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        if node.op in ("placeholder", "output") or any(user in needed for user in node.users):
            needed.add(node)
    return needed


@dataclasses.dataclass
class Decoded:
    """A graph that can be run and traced, without metadata, and what is said of it beside that.

    - `kept`: by the name of a constant, the call that it is the result of. It is to be in the engine, where tracing
      would only keep its result: the int8 weights of a layer (see `Registry.keep`).
    - `places`: of each call whose result is no size, the name of what it calls, and its module and line.
    """

    graph: torch.fx.GraphModule
    kept: dict[str, tuple[Callable[..., Any], list[Any]]] = dataclasses.field(default_factory=dict)
    places: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)


def is_value(node: Node) -> bool:
    """Whether a node is a call whose result is no size."""
    return node.op == "call_function" and not is_size(node)


def decode(nodes: Sequence[Any], tensors: Sequence[torch.Tensor], device: torch.device) -> Decoded:
    """The graph that `encode` has taken apart, with its constants, and the tensors that it makes, on a device.

    Raises `EngineError` for a call of anything that is not converted.
    """
    table, registry = _table(), load()
    decoded = Decoded(torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph()))

    def graph_of(listed: Sequence[Any], is_root: bool = False) -> torch.fx.GraphModule:
        module = decoded.graph if is_root else torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
        found: dict[str, Node] = {}
        for name, op, target, *rest in listed:
            if op == "call":
                function, places = _callable(target, table), rest[2]
                args, kwargs = (_argument(r, found, device) for r in rest[:2])
                constant = registry.is_kept(function) and not kwargs and _constants(module, args)
                if constant:
                    assign(module, f"kept_{name}", function(*constant))
                    decoded.kept[f"kept_{name}"] = function, constant
                    found[name] = module.graph.get_attr(f"kept_{name}")
                    continue
                found[name] = module.graph.create_node("call_function", function, tuple(args), kwargs)
                if places is not None and is_root:
                    decoded.places.append((target, *map(str, places)))
            elif op in ("tensor", "subgraph", "placeholder") and not _is_name(
                target, op == "placeholder"
            ):  # torch.fx writes names into code as they are
                raise EngineError(f"The graph has a node named {target!r}, which is no name.")
            elif op in ("tensor", "subgraph"):
                assign(module, target, tensors[rest[0]].to(device) if op == "tensor" else graph_of(rest[0]))
                found[name] = module.graph.get_attr(target)
            elif op == "placeholder":
                found[name] = add_input(module.graph, target)
            elif op == "output":
                module.graph.output(_argument(target, found, device))
            else:
                raise EngineError(f"The graph has a node of an unknown kind, {op!r}.")
        module.recompile()
        return module

    try:
        graph_of(nodes, is_root=True)
        return decoded
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"The graph makes no sense ({type(error).__name__}: {error}).") from error


def _is_name(name: Any, is_variable: bool) -> bool:
    """Whether this is the name of a variable, or of an attribute within attributes that Python has no meaning for."""
    if not isinstance(name, str):
        return False
    if is_variable:  # such as `__getitem___1`, which torch.fx calls what `x[rows]` gives
        return name.isidentifier() and not keyword.iskeyword(name) and not re.fullmatch(r"__.*__", name)
    return all(re.fullmatch(r"(?!__)[A-Za-z0-9_]+", part) for part in name.split("."))


def _constants(module: torch.fx.GraphModule, args: Sequence[Any]) -> list[Any] | None:
    """The arguments of a call of constants alone; `None` if some are computed."""
    nodes = [arg for arg in args if isinstance(arg, Node)]
    if not nodes or any(node.op != "get_attr" for node in nodes):
        return None
    return [getattr_of(module, arg) if isinstance(arg, Node) else arg for arg in args]


def getattr_of(module: torch.fx.GraphModule, node: Node) -> Any:
    """What a `get_attr` node stands for."""
    return operator.attrgetter(str(node.target))(module)


def _argument(value: Any, found: Mapping[str, Node], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, given),) = value.items()
    again = lambda v: _argument(v, found, device)  # noqa: E731
    if kind == "node":
        return found[given]
    if kind in ("float", "complex"):
        return {"float": float, "complex": complex}[kind](given)
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](map(again, given))
    if kind == "dict":
        return {again(k): again(v) for k, v in given}
    if kind == "slice":
        return slice(*map(again, given))
    if kind in ("dtype", "memory_format", "layout"):
        if not isinstance(named := getattr(torch, given), _KINDS):
            raise EngineError(f"The graph takes torch.{given} for a {kind}.")
        return named
    if kind == "device":
        return torch.device("cpu") if given == "cpu" and device.type != "cuda" else device
    if kind == "ellipsis":
        return Ellipsis
    raise EngineError(f"The graph has an argument of an unknown kind, {kind!r}.")


# Callables by name ---------------------------------------------------------------------------------------------------


def _table() -> dict[str, Callable[..., Any]]:
    registry = load()
    converted = {
        qualified_name(target): target for table in (registry.on_complex, registry.converters) for target in table
    }
    return {**converted, **_ARITHMETIC}


def name_of(target: Any) -> str:
    """What a callable is called in JSON."""
    return _NAMES.get(target) or qualified_name(target)


def _name(node: Node, table: Mapping[str, Callable[..., Any]]) -> str:
    target: Any = node.target
    name = name_of(target)
    if _callable(name, table) is not target:
        raise EngineError(f"The graph calls {name}, which another callable is called, too.")
    return name


def _callable(name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The callable of this name, if it is one that engines are made of."""
    if (known := table.get(name)) is not None:
        return known
    found: Any = None
    if name.startswith("torch.ops."):
        found = torch.ops
        for part in name.removeprefix("torch.ops.").split("."):
            found = getattr(found, part, None)
        is_operator = isinstance(found, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        if is_operator and (name == _SIZE or load().find(found) is not None):
            return found  # type: ignore[no-any-return]
    raise EngineError(
        f"The graph calls {name}, which has no converter here. The libraries whose operators it calls, and the files "
        "that register converters, must be imported before."
    )
