"""What a module gives for an example here, and in a helper process: it may be another module there.

A helper imports the classes and functions that the module is made of. What this process has done to them since it has
imported them, such as another `forward` for a class of a library, or another value of a global, the helper does not
know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torch2rt.background.helper import settings, with_settings
from torch2rt.background.sent import writes_of
from torch2rt.errors import EngineError
from torch2rt.tracing.calls.randomness import states

# How far off a result may be, in parts of its largest number: other kernels add in another order, or in TF32.
ALLOWED = {torch.float16: 2e-2, torch.bfloat16: 8e-2}
OTHERS = 1e-2
COUNTED = 0.1  # how many of the numbers of a result may be others where they are integers


class Example:
    """A module and the arguments of a call, as they are in one of the two processes."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.module, self.inputs, self.kwargs, self.settings = module, inputs, kwargs, settings()

    def write(self, file: Path) -> None:
        """Leave the results in a file, with the names of the attributes that the call has written to.

        There are no results of a module that draws random numbers, and no file where it cannot run beside the engine.
        """
        before = states(())
        with contextlib.suppress(Exception):
            with writes_of(self.module) as written:
                results = self.results()
            is_drawn = not all(map(torch.equal, before, states(())))
            torch.save({"results": None if is_drawn else results, "written": written}, file)

    def check(self, theirs: Mapping[str, Any]) -> None:
        """Raise `EngineError` where the other process has left other results."""
        if theirs["results"] is not None and not are_alike(self.results(), theirs["results"]):
            raise EngineError(
                "in the helper process, the module computes something else than here. A class, function or global "
                "that it uses has been changed since it was imported. Convert without background=True"
            )

    def results(self) -> list[torch.Tensor]:
        """The tensors of the module's result, on the CPU."""
        with torch.no_grad(), with_settings(self.settings):
            leaves = tree_leaves(self.module(*self.inputs, **self.kwargs))
        return [x.detach().cpu() for x in leaves if isinstance(x, torch.Tensor)]


def are_alike(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    """Whether these are the same results but for roundings.

    >>> are_alike([torch.tensor([1.0, 200.0])], [torch.tensor([1.1, 200.0])])
    True
    >>> are_alike([torch.tensor([1.0, 200.0])], [torch.tensor([1.0, 150.0])])
    False
    """
    return [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in theirs] and all(
        map(_is_like, ours, theirs)
    )


def _is_like(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if not (ours.is_floating_point() or ours.is_complex()):
        return not ours.numel() or float((ours != theirs).double().mean()) <= COUNTED
    finite = theirs.abs().double()[theirs.isfinite()]
    most = ALLOWED.get(ours.dtype, OTHERS) * (finite.max().item() if finite.numel() else 0.0)
    wide = torch.complex128 if ours.is_complex() else torch.float64
    return torch.allclose(ours.to(wide), theirs.to(wide), rtol=0.0, atol=most, equal_nan=True)
