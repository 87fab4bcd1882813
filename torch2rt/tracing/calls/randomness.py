"""Random numbers, which an engine does not draw: they are noticed by the states of their generators.

torch's are looked at around each call that runs for real. Python's and numpy's, which torch2rt sees nobody call, are
looked at around a whole trace; other threads may draw from them meanwhile, so a second trace has to differ as well.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from torch2rt.structure import as_bytes


def states(arguments: Any) -> list[torch.Tensor]:
    """The states of torch's generators that a call with these arguments may draw from."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    given = [x for x in tree_leaves(arguments) if isinstance(x, torch.Generator)]
    return [generator.get_state() for generator in (torch.default_generator, *cuda, *given)]


def put_states(before: list[torch.Tensor]) -> None:
    """Give torch's default generators these states, of `states(())`."""
    put_back(before, ())


def put_back(before: list[torch.Tensor], arguments: Any) -> bool:
    """Give the generators their former states, and say whether any had drawn numbers."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    given = [x for x in tree_leaves(arguments) if isinstance(x, torch.Generator)]
    drew = False
    for generator, state in zip((torch.default_generator, *cuda, *given), before):
        if not torch.equal(generator.get_state(), state):
            generator.set_state(state)
            drew = True
    return drew


def writes_random_numbers(func: Any) -> bool:
    """Whether a call fills its first argument with random numbers, or drops some of it, in place."""
    return getattr(func, "__name__", "").split(".")[0] in _IN_PLACE


_IN_PLACE = frozenset(
    """
        normal_ uniform_ bernoulli_ random_ exponential_ geometric_ cauchy_ log_normal_ dropout_ alpha_dropout_
        feature_dropout_ feature_alpha_dropout_ rrelu_
    """.split()
)


def states_elsewhere() -> Any:
    """The states of the generators outside of torch that everyone shares."""
    return random.getstate(), [bytes(x) if isinstance(x, np.ndarray) else x for x in np.random.get_state()]


@contextmanager
def same_states() -> Iterator[None]:
    """Let whoever draws random numbers afterwards draw what they would have drawn without what is done within."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def are_equal(one: torch.fx.GraphModule, other: torch.fx.GraphModule) -> bool:
    """Whether two traces of a module have the same calls, and the same constants in them."""
    if str(one.graph) != str(other.graph):
        return False
    for name in {node.target for node in one.graph.nodes if node.op == "get_attr"}:
        a, b = map(operator.attrgetter(name), (one, other))
        if isinstance(a, torch.fx.GraphModule):
            same = are_equal(a, b)
        else:
            same = torch.equal(*(as_bytes(x) for x in (a, b)))  # NaN is equal to itself
        if not same:
            return False
    return True
