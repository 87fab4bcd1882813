"""`str(size)` and `f"{size}"` in a module's Python, which ask which number the size is.

Torch writes a dynamic size as `s77`, which equals no number's text: `if str(n) == "7"` would be false for every size,
and `table[f"{height}x{width}"]` missing. So the text is the number's, and the number becomes a condition of the trace.
A text that only goes into a message asks nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from torch2rt.sizes import is_symbolic
from torch2rt.tracing.patches.process_switches import PerThread
from torch2rt.tracing.patches.size_functions import is_module_code
from torch2rt.tracing.patches.text_uses import is_told


def _is_told() -> bool:
    """Whether the code that makes a text only tells it."""
    frame = sys._getframe(1)
    while str(frame.f_globals.get("__name__")).startswith(_BETWEEN) and frame.f_back is not None:
        frame = frame.f_back
    return is_told(frame)


_BETWEEN = ("torch2rt.tracing.patches.", "torch.fx.experimental.sym_node")


def _number(size: Any) -> Any:
    """The number, which becomes a condition of the trace."""
    return (
        int(size) if isinstance(size, torch.SymInt) else bool(size) if isinstance(size, torch.SymBool) else float(size)
    )


def _text(original: Callable[..., str]) -> Callable[..., str]:
    """What takes the place of a method that makes a text of a size."""
    is_format = original.__name__ == "__format__"

    def text(size: Any, *specification: str) -> str:
        if not is_module_code() or not is_symbolic(size):
            return original(size, *specification)
        if _is_told():
            return f"{size.node.expr}"
        return format(_number(size), *specification) if is_format else str(_number(size))

    return text


SIZE_TEXTS = tuple(
    PerThread(kind, name, _text)
    for kind in (torch.SymInt, torch.SymFloat, torch.SymBool)
    for name in ("__repr__", "__str__", "__format__")
)


def _hash(original: Callable[[torch.SymInt], int]) -> Callable[[torch.SymInt], int]:
    def hash_of_number(size: torch.SymInt) -> int:
        return hash(int(size)) if is_module_code() else original(size)

    return hash_of_number


# Sizes as keys of tables and members of sets, which torch refuses. It makes the number a condition of the trace.
HASHED_SIZES = PerThread(torch.SymInt, "__hash__", _hash)
