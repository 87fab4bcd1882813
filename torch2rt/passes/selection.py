"""Which calls of a graph a user means: by module, path, pattern, class, torch function, or a predicate of his own."""

from __future__ import annotations

import difflib
import fnmatch
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.callables import qualified_name
from torch2rt.errors import InputError
from torch2rt.passes.precision_rules import spellings
from torch2rt.registry import load

# What Python's operators call.
_OPERATORS = {getattr(operator, name): getattr(torch, name) for name in "add sub mul matmul neg pow".split()}
_OPERATORS[operator.truediv] = torch.div


def items_of(value: Any) -> tuple[Any, ...]:
    """The items of an argument, of which one may stand alone."""
    if value is None:
        return ()
    return (value,) if isinstance(value, (str, type)) or callable(value) else tuple(value)


def select(
    argument: str, items: Any, graph: torch.fx.GraphModule, modules: Mapping[str, Any], others: bool = False
) -> dict[Node, str]:
    """The calls that the items of an argument mean, each with the item in words.

    An item is a module's path, which includes the modules in it; a pattern such as `"layers.*.mlp"`; a module, or a
    class of modules; a torch function, which includes the method of its name; or a function of a node that returns
    whether it is meant.
    `modules` are the root's modules by their paths. Raises `InputError` for an item that means no call, unless there
    are `others`: graphs in which it may mean one.
    """
    calls = _calls(graph)
    found: dict[Node, str] = {}
    for item in items_of(items):
        is_meant = _test(argument, item, modules)
        meant = [node for node in calls if is_meant(node)]
        if not meant and not others:
            near = _near(item, calls, modules)
            raise InputError(f"{argument}: {_words(item, modules)} means no call of the module.{near}")
        found.update(dict.fromkeys(meant, f"{argument}: {_words(item, modules)}"))
    return found


def check_meant(argument: str, items: Any, graphs: Sequence[torch.fx.GraphModule], modules: Mapping[str, Any]) -> None:
    """Raise `InputError` for an item that means no call in any of several graphs of one module."""
    for item in items_of(items):
        if not any(select(argument, [item], graph, modules, others=True) for graph in graphs):
            calls = [node for graph in graphs for node in _calls(graph)]
            near = _near(item, calls, modules)
            raise InputError(f"{argument}: {_words(item, modules)} means no call of any engine.{near}")


def _calls(graph: torch.fx.GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function" and "module" in node.meta]


def _test(argument: str, item: Any, modules: Mapping[str, Any]) -> Callable[[Node], bool]:
    if isinstance(item, str):
        return lambda node: is_within(node.meta["module"], item)
    if isinstance(item, torch.nn.Module) or isinstance(item, type) and issubclass(item, torch.nn.Module):
        paths = _paths(item, modules)
        return lambda node: any(not path or is_within(node.meta["module"], path) for path in paths)
    if callable(item) and not isinstance(item, type):
        item = _OPERATORS.get(item, item) if getattr(item, "__module__", "") == "_operator" else item
        same = [*spellings(item)]
        if load().find(item) is not None or load().body(item) is not None or len(same) > 1:
            return lambda node: any(node.target is other or node.meta.get("function") is other for other in same)
        return lambda node: _asked(argument, item, node)
    raise InputError(
        f"{argument}: {item!r} is no module, its path or a pattern, class of modules, torch function or function of a "
        "node."
    )


def _asked(argument: str, item: Any, node: Node) -> bool:
    """What a function of a node says of one."""
    try:
        return bool(item(node))
    except Exception as error:
        raise InputError(
            f"{argument}: {_words(item, {})} is no torch function that calls are made of, and as a function of a "
            f"torch.fx.Node it raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error


def _paths(item: Any, modules: Mapping[str, Any]) -> list[str]:
    """The paths of a module, or of those of a class."""
    if isinstance(item, type):
        return [path for path, module in modules.items() if isinstance(module, item)]
    return [path for path, module in modules.items() if module is item]


def is_within(path: str, pattern: str) -> bool:
    """Whether a module's path, or that of a module around it, is a path or matches a pattern."""
    return any(fnmatch.fnmatchcase(one, pattern) for one in _around(path)) or path == pattern


def _around(path: str) -> list[str]:
    """A module's path, and those of the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _words(item: Any, modules: Mapping[str, Any]) -> str:
    if isinstance(item, torch.nn.Module):
        return f"the module {', '.join(map(repr, _paths(item, modules))) or type(item).__name__}"
    if isinstance(item, str):
        return repr(item)
    return item.__name__ if isinstance(item, type) else qualified_name(item)


def _near(item: Any, calls: Sequence[Node], modules: Mapping[str, Any]) -> str:
    """What there is in the place of what is not there."""
    if isinstance(item, str):
        if item in modules or any(fnmatch.fnmatchcase(path, item) for path in modules if path):
            return " There is such a module, but it is not called, or does nothing, or is a part of other calls."
        return _listed(item, {path for node in calls for path in _around(node.meta["module"])} - {""}, "modules")
    if isinstance(item, (torch.nn.Module, type)):
        if _paths(item, modules):
            return " There are such modules, but they are not called, or do nothing, or are a part of other calls."
        classes = {type(modules[node.meta["module"]]).__name__ for node in calls if node.meta["module"] in modules}
        return _listed(_words(item, {}), classes, "classes of modules")
    functions = {qualified_name(node.target) for node in calls if callable(node.target)}
    return _listed(qualified_name(item), functions, "functions")


def _listed(wanted: str, names: Iterable[str], what: str) -> str:
    """The names that are near to a name, or else the first ones."""
    near = difflib.get_close_matches(wanted, sorted(names), 5, 0.7)
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    shown = sorted(names)
    return f" The {what} that make calls are {', '.join(map(repr, shown[:12]))}{' ...' * (len(shown) > 12)}."
