"""What an engine's contexts have found out for the shapes of a call, remembered for all of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

MOST = 1 << 14  # sets of shapes that are remembered for an engine, each in about a kilobyte

Shapes = tuple[torch.Size, ...]  # of the inputs of one call, in the engine's order
Output = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype]  # name, shape, strides, dtype


class Fit(NamedTuple):
    """The engine takes these shapes.

    - `told`: how TensorRT is told of each input; `outputs`: what it will give.
    - `profile`: the optimization profile that is the nearest.
    """

    told: Sequence[tuple[int, ...]]
    outputs: Sequence[Output]
    profile: int


class Fits:
    """A `Fit` for each of the sets of shapes that were checked, until there are too many, when the oldest is forgotten.

    `get(shapes)` gives `None` for those that are not known. It takes no lock, as it is called for each change of shape.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Fit] = {}
        self.get = self.known.get
        self.lock = threading.Lock()

    def keep(self, shapes: Shapes, fit: Fit) -> None:
        """Remember shapes that were checked."""
        with self.lock:
            while len(self.known) >= MOST:
                del self.known[next(iter(self.known))]
            self.known[shapes] = fit
