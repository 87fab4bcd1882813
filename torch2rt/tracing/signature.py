"""The parameters of a module's `forward`, and the names that they give to the tensors of a call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from torch2rt.structure import Spec, children

UNNAMED = "input"  # what stands in for the name of a parameter that nobody can tell


def parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of `forward`; none where neither Python nor TorchScript knows them.

    A module around another one says by its attribute `called_as` whose parameters its own are.
    """
    forward = getattr(getattr(forward, "__self__", None), "called_as", forward)
    try:
        return list(inspect.signature(forward).parameters.values())
    except ValueError:  # compiled by TorchScript, which has a schema instead
        schema = getattr(forward, "schema", None)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [inspect.Parameter(a.name, kind) for a in schema.arguments[1:]] if schema is not None else []


def keyword_names(forward: Callable[..., Any]) -> list[str]:
    """The keyword of each parameter that may be given by position; `""` if it cannot be given by keyword."""
    names = {inspect.Parameter.POSITIONAL_ONLY: lambda p: "", inspect.Parameter.POSITIONAL_OR_KEYWORD: lambda p: p.name}
    return [names[p.kind](p) for p in parameters(forward) if p.kind in names]


def tensor_names(forward: Callable[..., Any], arguments: Spec) -> list[str]:
    """A name for each tensor of a call: its parameter's, with a suffix for its place in a container.

    `arguments` describes `(args, kwargs)` as `structure.flatten` does. The tensors of `forward(x, *args, mask)` are
    called `x`, `args_0`, `args_1` and `mask`. Those of `boxes=[a, b]` and `state={"h": a}` are called `boxes_0`,
    `boxes_1` and `state_h`.
    """
    positional, keywords = (children(spec) for spec in arguments["tuple"])
    known = parameters(forward)
    names = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    star = next((p.name for p in known if p.kind is p.VAR_POSITIONAL), UNNAMED)
    names += [f"{star}_{index}" for index in range(len(positional) - len(names))]
    roots = [*zip(names, positional.values()), *keywords.items()]
    return distinct(name for root, spec in roots for name in _leaf_names(str(root), spec))


def _leaf_names(name: str, spec: Spec) -> Iterator[str]:
    if "leaf" in spec:
        yield name
    for key, child in children(spec).items():
        yield from _leaf_names(f"{name}_" + re.sub(r"\W", "_", str(key)), child)


def distinct(names: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """The names in their order; one that is taken or stood before gets the first free number as a suffix."""
    found: dict[str, None] = {}
    for name in names:
        number, unique = 0, name
        while unique in found or unique in taken:
            number, unique = number + 1, f"{name}_{number}"
        found[unique] = None
    return list(found)
