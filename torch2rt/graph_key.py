"""A key for a traced graph: two graphs that differ in anything a network depends on have other keys.

It is a digest of a text with every call, argument, edge, type, size and constant. Nodes are numbered, so that their
names do not matter; the lines that calls come from do not matter either.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from torch2rt.backend.disk_cache import CHUNK, digest
from torch2rt.callables import Target, qualified_name
from torch2rt.graph import graph_meta
from torch2rt.registry import load
from torch2rt.sizes import expression, is_symbolic
from torch2rt.structure import as_bytes

Constant = Callable[[torch.Tensor], str]


class Unkeyable(Exception):
    """Something in a graph has no name by which another process would know it."""


def graph_key(graph: torch.fx.GraphModule, constant: Constant, *more: Any) -> str:
    """The key of a graph, in which `constant` says what a constant's values are; `more` are plain values beside it.

    Raises `Unkeyable` for a graph with functions or arguments that cannot be named, such as a lambda.

    >>> from torch2rt import trace
    >>> def key(*args):
    ...     return graph_key(trace(torch.nn.Flatten(*args), [torch.randn(2, 3, 4)]), lambda constant: "")
    >>> key(1) == key(1), key(1) == key(2)
    (True, False)
    """
    hashed = hashlib.sha256()
    for line in _lines(graph, constant):
        hashed.update(line.encode() + b"\n")
    hashed.update(_text(more).encode())
    return hashed.hexdigest()


def _lines(graph: torch.fx.GraphModule, constant: Constant) -> Iterator[str]:
    meta = graph_meta(graph)
    yield _text(dataclasses.asdict(meta.interface))
    yield _text({str(symbol): repr(dim) for symbol, dim in meta.symbols.items()})
    yield _text([[str(d.claim), d.internal, d.assumed] for d in meta.assumed.decisions])
    yield _text([meta.assumptions, meta.refusals, list(map(str, meta.asserted))])
    yield from _nodes(graph, constant)


def _nodes(graph: torch.fx.GraphModule, constant: Constant) -> Iterator[str]:
    numbers: dict[Node, int] = {}
    for node in graph.graph.nodes:
        numbers[node] = len(numbers)
        yield f"{node.op} {node.meta.get('input')} {node.meta.get('module')!r} {_recorded(node.meta.get('val'))}"
        if node.op == "call_function":
            yield f"{target_key(node.target)} {_text((node.args, node.kwargs), numbers)}"
            yield _text([[axis, str(bound)] for axis, bound in node.meta.get("unbacked", {}).items()])
        elif node.op == "output":
            yield _text(node.args, numbers)
        elif node.op == "get_attr":
            value = functools.reduce(getattr, str(node.target).split("."), graph)
            yield str(node.target) if not str(node.target).startswith("_constant_") else "constant"
            if isinstance(value, torch.fx.GraphModule):
                yield from _nodes(value, constant)
                yield "end"
            elif isinstance(value, torch.Tensor):
                yield f"{_tensor(value)} {constant(value)}"
            else:
                raise Unkeyable(f"a constant of type {type(value).__name__}")


def content(tensor: torch.Tensor) -> str:
    """A digest of a tensor's elements; raises `Unkeyable` for tensors that have none at hand."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or type(tensor) not in _KINDS:
        raise Unkeyable(f"a {tensor.layout} {type(tensor).__name__}")
    data = as_bytes(tensor).cpu().numpy()
    return digest(memoryview(data)) if data.nbytes > CHUNK else hashlib.sha256(data).hexdigest()


_KINDS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


# Text ----------------------------------------------------------------------------------------------------------------


def _recorded(value: Any) -> str:
    """What is recorded for a node: types, sizes and strides, but no values."""
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if is_symbolic(value):
        return f"{type(value).__name__}({expression(value)})"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(_recorded, value))})"
    return type(value).__name__ if isinstance(value, torch.nn.Module) else _text(value)


def _tensor(tensor: torch.Tensor) -> str:
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    sizes, strides = ([str(expression(s)) if is_symbolic(s) else str(s) for s in x] for x in (tensor.shape, strides))
    return f"{tensor.dtype} {sizes} {strides} {tensor.device.type} {tensor.layout}"


def _text(value: Any, numbers: dict[Node, int] | None = None) -> str:
    """A value as a text that no other one has: 1, 1.0 and True differ, as do 0.0 and -0.0."""
    if isinstance(value, Node):
        return f"%{(numbers or {})[value]}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    if type(value) in (bool, int, str, bytes, type(None), type(...)):
        return repr(value)
    if type(value) is float:
        return f"float({value.hex()})"
    if type(value) is complex:
        return f"complex({value.real.hex()}, {value.imag.hex()})"
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return f"{type(value).__name__}({value})"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), numbers)}"
    if isinstance(value, range):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(k, numbers)}: {_text(v, numbers)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__qualname__}({', '.join(_text(item, numbers) for item in value)})"
    if isinstance(value, (set, frozenset)):
        return f"set({', '.join(sorted(_text(item, numbers) for item in value))})"
    if isinstance(value, type):
        return f"type {value.__module__}.{value.__qualname__}"
    if is_symbolic(value):
        return f"{type(value).__name__}({expression(value)})"
    if type(value).__module__.split(".")[0] in ("torch2rt", "sympy"):  # in claims about sizes
        if dataclasses.is_dataclass(value) or isinstance(value, sympy.Basic):
            return f"{type(value).__qualname__} {value!r}"
    raise Unkeyable(f"an argument of type {type(value).__module__}.{type(value).__qualname__}")


# Code ----------------------------------------------------------------------------------------------------------------


def target_key(target: Any) -> str:
    """A name of a callable, and the version of its code and its converter's where that is not torch's or ours."""
    name = qualified_name(target)
    if not isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        if isinstance(target, types.MethodWrapperType):
            name = f"getter {name}"
        elif _named(name) is not target:
            name = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', '')}"
            if _named(name) is not target:
                raise Unkeyable(f"the function {name}, which has no name of its own")
    converter = load().find(target)
    return f"{name} {_version(target)} {'' if converter is None else _version(converter.function)}"


def _named(path: str) -> Any:
    """The object of a dotted name, or `None`."""
    module = path
    rest: list[str] = []
    while module and module not in sys.modules:
        module, _, last = module.rpartition(".")
        rest.insert(0, last)
    found: Any = sys.modules.get(module)
    for part in rest:
        found = getattr(found, part, None)
    return found


@functools.cache
def _version(function: Target) -> str:
    """A digest of the file that a function is in; empty for functions of torch, Python and torch2rt itself."""
    module = getattr(function, "__module__", None)
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return "" if str(function).split(".")[0] in ("aten", "prims", "prim") else f"torchvision {_torchvision()}"
    if module is None or module.split(".")[0] in ("torch", "builtins", "_operator", "operator", "math", "torch2rt"):
        return ""
    file = getattr(sys.modules.get(module), "__file__", None)
    if "<locals>" in getattr(function, "__qualname__", "") or file is None or not Path(file).is_file():
        raise Unkeyable(f"the function {qualified_name(function)}, whose code is in no file")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _torchvision() -> str:
    return str(getattr(sys.modules.get("torchvision"), "__version__", ""))


@functools.cache
def own_code() -> str:
    """A digest of all that torch2rt is made of."""
    load()
    hashed = hashlib.sha256()
    for package in ("torch2rt", "torch2rt.converters"):
        for folder in map(Path, sys.modules[package].__path__):
            for file in sorted(folder.rglob("*.py")):
                hashed.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return hashed.hexdigest()
