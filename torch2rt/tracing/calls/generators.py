"""What a module does to torch's generators beside drawing from them: `manual_seed`, saved and restored states.

torch tells nobody of it. So each generator has, between two draws of a trace, a state of ours that nobody would set.
Where a draw finds another one, the module has set it: to one of those that it had before, or to a constant. The graph
then has a call that does so. After a trace the generators have their former states.

A generator that is no attribute of the module is taken for one that each call makes and seeds. A second trace, in which
it has another state if it is not, would find another constant; so would a second trace after a draw of another thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from torch2rt.python_calls import DrawsFrom, SavesState, SetsState, set_state

_SEEDS = itertools.count(0x7051F00D5EED)
_DEPTH = 3  # of lists and dicts in a module's attributes, in which generators are looked for


class Generators:
    """The generators of one trace.

    `sets_constants`: whether the graph gives one a constant state.
    """

    def __init__(self, graph: torch.fx.Graph, module: torch.nn.Module) -> None:
        self.graph = graph
        cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        own = (g for m in module.modules() for g in _found(list(vars(m).values()), _DEPTH))
        self.kept: dict[int, torch.Generator] = {  # by what the Python objects for one have in common
            g._cdata: g for g in (torch.default_generator, *cuda, *own)
        }
        self.strangers: dict[int, tuple[torch.Generator, bytes]] = {}
        self.sets_constants = False
        self._now: dict[int, bytes] = {}  # the states
        self._known: dict[int, dict[bytes, torch.fx.Node | None]] = {}  # after which draw there was a state
        self._first: torch.fx.Node | None = None  # that draws, or sets a state
        self._last: torch.fx.Node | None = None  # that draws

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context for the module's run; its generators have their states again afterwards."""
        before = {key: _state(generator) for key, generator in self.kept.items()}
        self._new_states()
        try:
            yield
        finally:
            for key, generator in self.kept.items():
                set_state(generator, before[key])

    def note_draw(self, node: torch.fx.Node, generator: torch.Generator | None = None) -> None:
        """A call that may draw numbers was recorded; `generator` is the one that it names."""
        if generator is not None and generator._cdata not in self.kept and generator._cdata not in self.strangers:
            self.strangers[generator._cdata] = generator, _state(generator)
        self.settle(node)
        self._first = self._first or node
        self._last = node
        self._new_states()

    def settle(self, before: torch.fx.Node | None = None) -> None:
        """Record the states that the module has set since the last draw, before a node, or at the end."""
        for key, generator in self._all().items():
            if (state := _state(generator)) == self._now.get(key):
                continue
            target: SetsState
            if state not in self._known.get(key, {}):
                target, self.sets_constants = SetsState(generator, state), True
            else:
                known, save = self._known[key][state], SavesState(generator)
                self._record(save, None if known is None else known.next, self._first or before)
                target = SetsState(generator, save)
            node = self._record(target, before, None)
            self._first = self._first or node
            self._now[key] = state

    def _record(self, target: Any, before: torch.fx.Node | None, otherwise: torch.fx.Node | None) -> torch.fx.Node:
        place = before if before is not None else otherwise
        with nullcontext() if place is None else self.graph.inserting_before(place):
            node = self.graph.call_function(target)
        node.meta.update(val=None, module="", source="")
        return node

    def _all(self) -> dict[int, torch.Generator]:
        return {**self.kept, **{key: generator for key, (generator, _) in self.strangers.items()}}

    def _new_states(self) -> None:
        for key, generator in self._all().items():
            generator.manual_seed(next(_SEEDS))
            self._now[key] = _state(generator)
            self._known.setdefault(key, {})[self._now[key]] = self._last

    def give_back(self) -> None:
        """Give the generators that are no attributes of the module the states that they were found in."""
        for generator, state in self.strangers.values():
            set_state(generator, state)


def with_generator(func: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], torch.Generator | None]:
    """A call that names a generator, as one of a callable that has it; the generator."""
    generator = kwargs.get("generator")
    if not isinstance(generator, torch.Generator):
        return func, kwargs, None
    return DrawsFrom(func, generator), {k: v for k, v in kwargs.items() if k != "generator"}, generator


def _state(generator: torch.Generator) -> bytes:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return bytes(generator.get_state().numpy())


def _found(values: list[Any], depth: int) -> Iterator[torch.Generator]:
    for value in values:
        if isinstance(value, torch.Generator):
            yield value
        elif isinstance(value, (list, tuple, dict)) and depth:
            yield from _found(list(value.values() if isinstance(value, dict) else value), depth - 1)
