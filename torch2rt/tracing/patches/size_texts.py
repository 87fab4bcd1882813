"""`str(size)` and `f"{size}"` in a module's Python: a text that is compared asks which size it is.

Torch writes a dynamic size as `s77`, which equals no number's text: `if str(n) == "7"` would be false for every size.
A text that only goes into a message asks nothing. What is made of several pieces, such as `f"layer{n}"`, is no such
text any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch2rt.sizes import is_symbolic
from torch2rt.tracing.patches.process_switches import PerThread
from torch2rt.tracing.patches.size_functions import is_module_code


class SizeText(str):
    """The text of a dynamic size, as torch writes it, with the comparisons and methods of its number's text."""

    size: torch.SymInt

    @classmethod
    def of(cls, text: str, size: torch.SymInt) -> SizeText:
        made = cls(text)
        made.size = size
        return made

    def number(self) -> str:
        """The text of the number, which makes this number a condition of the trace."""
        return str(int(self.size))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SizeText):
            return bool(self.size == other.size)
        if not isinstance(other, str) or not other.isdecimal() or str(int(other)) != other:
            return False
        return bool(self.size == int(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.number())

    def __str__(self) -> str:
        return self


def _of_number(name: str) -> Callable[..., Any]:
    def call(self: SizeText, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.number(), name)(*args, **kwargs)

    return call


_READING = (
    "__add__ __contains__ __getitem__ __ge__ __gt__ __iter__ __le__ __len__ __lt__ __mod__ __mul__ __rmul__".split()
)
for _name in (*_READING, *(name for name in dir(str) if not name.startswith("_") and name != "maketrans")):
    setattr(SizeText, _name, _of_number(_name))


def _text(original: Callable[[Any], str]) -> Callable[[Any], str]:
    def text(size: Any) -> str:
        found = original(size)
        if type(size) is torch.SymInt and is_module_code() and is_symbolic(size):
            return SizeText.of(found, size)
        return found

    return text


SIZE_TEXTS = (PerThread(torch.SymInt, "__repr__", _text),)
