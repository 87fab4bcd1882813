"""Functions behind `functools.lru_cache`, which must neither see a trace's sizes and tensors nor keep them.

Python looks up a call by the hash of its arguments, and a symbolic size has none. A traced tensor has one, and so what
was computed from it would stay in the cache.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from torch2rt.sizes import is_symbolic

_Memo: Any = type(functools.lru_cache(len))
_OTHERS = ("torch", "sympy", "torch2rt")  # these do not keep what belongs to a trace


@contextmanager
def uncached() -> Iterator[None]:
    """Let calls with traced arguments go past every cache, in this thread.

    The object behind `lru_cache` cannot be changed, so whatever refers to it, such as a class or a module, refers to a
    function of ours in the meantime. That takes a search through all objects of the process.
    """
    undo: list[Callable[[], None]] = []
    try:
        for holder, key, memo, get, put in list(_references()):
            stand_in = _uncached(memo)
            put(holder, key, stand_in)
            undo.append(functools.partial(_restore, holder, key, memo, stand_in, get, put))
        yield
    finally:
        for restore in undo:
            restore()


def _uncached(memo: Any) -> Callable[..., Any]:
    """A function that calls the one behind a cache if it has traced arguments, and else asks the cache."""
    here = threading.get_ident()

    @functools.wraps(memo)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_ours = threading.get_ident() == here and any(map(_is_traced, tree_leaves((args, kwargs))))
        return (memo.__wrapped__ if is_ours else memo)(*args, **kwargs)

    vars(call).update(cache_info=memo.cache_info, cache_clear=memo.cache_clear, cache_parameters=memo.cache_parameters)
    return call


def _references() -> Iterator[tuple[Any, Any, Any, Callable[..., Any], Callable[..., None]]]:
    """What refers to caches: the holder, its key there, the cache, and functions to get and put what the key has."""
    memos = _memos()
    classes = {
        id(content): o
        for o in gc.get_objects()
        if issubclass(type(o), type) and any(type(value) is _Memo for value in vars(o).values())
        for content in gc.get_referents(o)
    }
    ids = {id(memo): memo for memo in memos}
    for holder in gc.get_referrers(*memos):
        if isinstance(holder, types.CellType):
            yield holder, "cell_contents", holder.cell_contents, getattr, setattr
        elif type(holder) is dict and holder is not ids:
            for key, value in list(holder.items()):
                if id(value) in ids and (cls := classes.get(id(holder))) is not None:
                    yield cls, key, value, getattr, setattr
                elif id(value) in ids:
                    yield holder, key, value, dict.get, dict.__setitem__
        elif type(holder) is list and holder is not memos:
            for index, value in enumerate(holder):
                if id(value) in ids:
                    yield holder, index, value, list.__getitem__, list.__setitem__


def _restore(holder: Any, key: Any, memo: Any, stand_in: Any, get: Any, put: Any) -> None:
    with contextlib.suppress(LookupError, ValueError, AttributeError):  # it is gone
        if get(holder, key) is stand_in:
            put(holder, key, memo)


def _memos() -> list[Any]:
    return [o for o in gc.get_objects() if type(o) is _Memo and (o.__module__ or "").split(".")[0] not in _OTHERS]


_known: dict[int, list[Any]] = {}  # weak references to the caches, by how many modules were imported then


def _known_memos() -> list[Any]:
    """The caches that stand in modules and classes; those that a function makes are not looked for each time."""
    if (imported := len(sys.modules)) not in _known:
        found = [weakref.ref(memo) for memo in _memos()]
        _known.clear()
        _known[imported] = found
    return [memo for ref in _known.get(imported, ()) if (memo := ref()) is not None]


@contextmanager
def cleared() -> Iterator[None]:
    """Empty the caches that have come to hold tensors of a trace, whose keys let Python look them up."""
    before = [(memo, memo.cache_info().misses) for memo in _known_memos()]
    try:
        yield
    finally:
        for memo, misses in before:
            if memo.cache_info().misses != misses and any(map(_is_traced, _content(memo))):
                memo.cache_clear()


def _content(memo: Any) -> list[Any]:
    """All that a cache's keys and results consist of."""
    entries = gc.get_referents(memo)
    entries += [x for entry in entries if type(entry) is dict for pair in entry.items() for x in pair]
    return tree_leaves([list(e) if isinstance(e, list) else e for e in entries])


def _is_traced(value: Any) -> bool:
    return isinstance(value, FakeTensor) or is_symbolic(value)
