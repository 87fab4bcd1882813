"""Which calls of a graph a user means: by module path, pattern, class, torch function, or a predicate of his own."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.callables import qualified_name
from torch2rt.errors import InputError
from torch2rt.passes.precision_rules import spellings
from torch2rt.registry import load


def select(argument: str, items: Any, graph: torch.fx.GraphModule, modules: Mapping[str, Any]) -> dict[Node, str]:
    """The calls that the items of an argument mean, each with the item in words.

    An item is a module's path, which includes the modules in it; a pattern such as `"layers.*.mlp"`; a class of
    modules; a torch function, which includes the method of its name; or a function of a node that returns whether it is
    meant.
    `modules` are the root's modules by their paths. Raises `InputError` for an item that means no call.
    """
    calls = [node for node in graph.graph.nodes if _is_call(node)]
    found: dict[Node, str] = {}
    for item in [items] if isinstance(items, (str, type)) or callable(items) else list(items):
        is_meant = _test(argument, item, modules)
        meant = [node for node in calls if is_meant(node)]
        if not meant:
            raise InputError(f"{argument}: {_words(item)} means no call of the module.{_near(item, calls)}")
        found.update(dict.fromkeys(meant, f"{argument}: {_words(item)}"))
    return found


def _is_call(node: Node) -> bool:
    return node.op == "call_function" and "module" in node.meta


def _test(argument: str, item: Any, modules: Mapping[str, Any]) -> Callable[[Node], bool]:
    if isinstance(item, str):
        return lambda node: is_within(node.meta["module"], item)
    if isinstance(item, type) and issubclass(item, torch.nn.Module):
        paths = [path for path, module in modules.items() if isinstance(module, item)]
        return lambda node: any(not path or is_within(node.meta["module"], path) for path in paths)
    if callable(item) and not isinstance(item, type):
        if load().find(item) is not None or load().body(item) is not None or len(same := [*spellings(item)]) > 1:
            same = [*spellings(item)]
            return lambda node: any(node.target is other or node.meta.get("function") is other for other in same)
        return lambda node: bool(item(node))
    raise InputError(
        f"{argument}: {item!r} is no module path or pattern, class of modules, torch function or function of a node."
    )


def is_within(path: str, pattern: str) -> bool:
    """Whether a module's path, or that of a module around it, is a path or matches a pattern."""
    parts = path.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(one, pattern) for one in around) or path == pattern


def _words(item: Any) -> str:
    if isinstance(item, str):
        return repr(item)
    return item.__name__ if isinstance(item, type) else qualified_name(item)


def _near(item: Any, calls: Iterable[Node]) -> str:
    """What there is in the place of a path that is not there."""
    if not isinstance(item, str):
        return ""
    paths = sorted({node.meta["module"] for node in calls} - {""})
    return f" Its modules that make calls are {', '.join(map(repr, paths[:12]))}{' ...' * (len(paths) > 12)}."
