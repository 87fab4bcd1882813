"""What is supported, at which level: the register, and what was measured for public functions that are not in it.

`torch2rt ops` prints it, and `docs/operators.md` is `python -m torch2rt.cli.ops`.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator

import torch
import torchvision  # noqa: F401  (so that the converters of its operators are listed)

from torch2rt.callables import Target, qualified_name
from torch2rt.cli.levels import MEASURED, TORCH
from torch2rt.registry import Registry, load

LEVELS = {
    "opened": "converted as the torch calls that torch's own Python makes for them",
    "aten": "converted as the ATen operators that they run",
    "refused": "not converted",
}


def families(pattern: str = "") -> dict[str, list[tuple[list[str], str]]]:
    """By file in `converters/`: the callables that share a converter, and what it refuses.

    The operators that torch's public functions call are left out: `torch2rt ops` speaks of what users write.

    >>> families("leaky_relu")["activation"]
    [(['torch.nn.functional.leaky_relu'], '')]
    """
    found: dict[str, list[tuple[list[str], str]]] = {}
    for (family, _, limits), targets in _converters(load()).items():
        names = list(dict.fromkeys(map(qualified_name, targets)))
        if names := [name for name in names if not name.startswith(_PRIVATE) and pattern in name]:
            found.setdefault(family, []).append((names, limits))
    return dict(sorted(found.items()))


_PRIVATE = ("torch.ops.aten.", "torch.ops.prims.", "torch._", "torch2rt.passes.")


def _converters(registry: Registry) -> dict[tuple[str, int, str], list[Target]]:
    """The callables of each converter and of each composite: its file, its identity and its limits."""
    found: dict[tuple[str, int, str], list[Target]] = {}
    converters = [*registry.converters.items(), *registry.on_complex.items()]
    entries = [(target, converter.function, converter.limits) for target, converter in converters]
    composites = [(target, inspect.unwrap(body), "") for target, body in registry.composites.items()]
    for target, function, limits in [*entries, *(c for c in composites if c[0] not in registry.converters)]:
        found.setdefault((function.__module__.rpartition(".")[2], id(function), limits), []).append(target)
    return found


def measured(pattern: str = "") -> dict[str, list[str]]:
    """By level: the public functions that have no converter."""
    return {level: [name for name in MEASURED[level].split() if pattern in name] for level in LEVELS}


def markdown() -> str:
    """All of it, as `docs/operators.md` has it."""
    return "\n".join(_markdown()) + "\n"


def _markdown() -> Iterator[str]:
    listed = families()
    total = sum(len(names) for entries in listed.values() for names, _ in entries)
    yield "# Operators"
    yield ""
    yield "<!-- Written by `python -m torch2rt.cli.ops`; the tests hold it against the converters. -->"
    yield ""
    yield from _paragraph(
        f"{total} callables of torch {TORCH} have a converter, or a body of torch2rt's own that is made of calls which "
        "have one. In-place spellings, operators and `out=` come with them. Of the public functions that have none, "
        f"{len(measured()['opened'])} are {LEVELS['opened']} and {len(measured()['aten'])} {LEVELS['aten']}. "
        f"{len(measured()['refused'])} are {LEVELS['refused']}: an error names the call, with the line that makes it."
    )
    yield ""
    yield "## With a converter"
    for family, entries in listed.items():
        yield ""
        yield f"### {family}"
        yield ""
        for names, limits in entries:
            yield "- " + ", ".join(f"`{name}`" for name in names) + (f" ({limits})" if limits else "")
    for level, what in LEVELS.items():
        yield ""
        yield f"## {what[0].upper()}{what[1:]}"
        yield ""
        yield from _paragraph(", ".join(f"`{name}`" for name in measured()[level]) + ".")
    yield ""
    yield "## Left out here"
    yield ""
    yield from _paragraph(
        "Sparse, nested and quantized tensors, and what only other backends run; gradients; calls that return no "
        "tensor, such as `x.dim()`, which Python makes while the module is traced. Calls that draw random numbers are "
        "refused."
    )


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def is_listed_version() -> bool:
    """Whether this torch is the one that was measured."""
    return torch.__version__.split(".")[:2] == TORCH.split(".")


if __name__ == "__main__":
    print(markdown(), end="")
