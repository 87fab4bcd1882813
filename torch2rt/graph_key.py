"""A key for a traced graph: two graphs that differ in anything a network depends on have other keys.

It is a digest of a text with every call, argument, edge, type, size and constant. Nodes are numbered, so that their
names do not matter; the lines that calls come from do not matter either.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import hashlib
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from torch2rt.backend.disk_cache import CHUNK
from torch2rt.callables import Target, qualified_name
from torch2rt.graph import graph_meta
from torch2rt.registry import load
from torch2rt.sizes import expression, is_symbolic
from torch2rt.structure import as_bytes

Constant = Callable[[torch.Tensor], str | None]

HELD = 2**26  # bytes of tensors that are copied from the GPU and not digested yet


class Unkeyable(Exception):
    """Something in a graph has no name by which another process would know it."""


def graph_key(graph: torch.fx.GraphModule, constant: Constant, *more: Any) -> str:
    """The key of a graph; `more` are plain values beside it.

    `constant` says what stands for a constant's values, and `None` has the key depend on its elements, as `content`
    does for all. Raises `Unkeyable` for a graph with functions or arguments that cannot be named, such as a lambda.

    >>> from torch2rt import trace
    >>> def key(*args):
    ...     return graph_key(trace(torch.nn.Flatten(*args), [torch.randn(2, 3, 4)]), lambda constant: "")
    >>> key(1) == key(1), key(1) == key(2)
    (True, False)
    """
    hashed = hashlib.sha256()
    for line in _lines(graph, _of_constants(graph, constant)):
        hashed.update(line.encode() + b"\n")
    hashed.update(_text(more).encode())
    return hashed.hexdigest()


def content(tensor: torch.Tensor) -> None:
    """Says for `graph_key` that the elements of a constant are in the key."""


def _lines(graph: torch.fx.GraphModule, constants: Mapping[int, str]) -> Iterator[str]:
    meta = graph_meta(graph)
    yield _text(dataclasses.asdict(meta.interface))
    yield _text({str(symbol): repr(dim) for symbol, dim in meta.symbols.items()})
    yield _text([[str(d.claim), d.internal, d.assumed] for d in meta.assumed.decisions])
    yield _text([meta.assumptions, meta.refusals, list(map(str, meta.asserted))])
    yield from _nodes(graph, constants)


def _nodes(graph: torch.fx.GraphModule, constants: Mapping[int, str]) -> Iterator[str]:
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
            value = _attribute(graph, node)
            yield str(node.target) if not str(node.target).startswith("_constant_") else "constant"
            if isinstance(value, torch.fx.GraphModule):
                yield from _nodes(value, constants)
                yield "end"
            elif isinstance(value, torch.Tensor):
                yield f"{_tensor(value)} {constants[id(value)]}"
            else:
                raise Unkeyable(f"a constant of type {type(value).__name__}")


def _attribute(graph: torch.fx.GraphModule, node: Node) -> Any:
    return functools.reduce(getattr, str(node.target).split("."), graph)


def _of_constants(graph: torch.fx.GraphModule, constant: Constant) -> dict[int, str]:
    """What stands in the key for each constant's values, by its id."""
    found: dict[int, str] = {}
    hashed: dict[int, torch.Tensor] = {}
    todo = [graph]
    while todo:
        module = todo.pop()
        for value in (_attribute(module, node) for node in module.graph.find_nodes(op="get_attr")):
            if isinstance(value, torch.fx.GraphModule):
                todo.append(value)
            elif isinstance(value, torch.Tensor) and (text := constant(value)) is not None:
                found[id(value)] = text
            elif isinstance(value, torch.Tensor):
                hashed[id(value)] = value
    return {**found, **dict(zip(hashed, contents(hashed.values()), strict=True))}


def contents(tensors: Iterable[torch.Tensor]) -> list[str]:
    """Digests of tensors' elements; raises `Unkeyable` for tensors that have none at hand.

    A core digests a gigabyte or so in a second, so that all work at once, on what this thread copies from the GPU.
    """
    waiting: collections.deque[tuple[int, Future[bytes]]] = collections.deque()
    digests: list[list[Future[bytes]]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for tensor in tensors:
            if (
                tensor.layout is not torch.strided
                or tensor.is_quantized
                or tensor.is_meta
                or type(tensor) not in _KINDS
            ):
                raise Unkeyable(f"a {tensor.layout} {type(tensor).__name__}")
            digests.append([])
            for part in as_bytes(tensor).split(CHUNK):
                data = part.cpu().numpy()
                digests[-1].append(pool.submit(_sha256, data))
                waiting.append((data.nbytes, digests[-1][-1]))
                while sum(size for size, _ in waiting) > HELD:
                    waiting.popleft()[1].result()
    return [_sha256(b"".join(part.result() for part in parts)).hex() for parts in digests]


def _sha256(data: Any) -> bytes:
    return hashlib.sha256(data).digest()


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
