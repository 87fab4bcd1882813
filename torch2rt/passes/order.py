"""The passes that a conversion runs between trace and lower, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from torch2rt.errors import InputError
from torch2rt.graph import check_graph
from torch2rt.passes.causal import recognise_causal
from torch2rt.passes.float64 import narrow_float64
from torch2rt.passes.fuse import fuse
from torch2rt.passes.quantization.recognize import recognize_int8
from torch2rt.passes.quantization.stored import keep_quantized
from torch2rt.passes.repeated import fold_repeated

Pass = Callable[[torch.fx.GraphModule], torch.fx.GraphModule]

FLOAT64 = ("float32", "refuse")


def default(float64: str = "float32") -> list[Pass]:
    """The passes of a conversion that is given none, in the order in which they run.

    - `float64`: `"float32"` has the pass that computes float64 values in float32; `"refuse"` leaves it out, so that
      lowering refuses float64.

    >>> [pass_.__name__ for pass_ in default()]
    ['fold_repeated', 'recognise_causal', 'narrow_float64', 'recognize_int8', 'keep_quantized', 'fuse']
    """
    if float64 not in FLOAT64:
        raise InputError(f"{float64=} is not one of {', '.join(map(repr, FLOAT64))}.")
    narrow: list[Pass] = [narrow_float64] if float64 == "float32" else []
    return [fold_repeated, recognise_causal, *narrow, recognize_int8, keep_quantized, fuse]


def chosen(passes: Iterable[Pass] | None, float64: str) -> list[Pass]:
    """The passes that a conversion is asked for; raises `InputError` where `passes` and `float64` contradict."""
    defaults = default(float64)
    if passes is None:
        return defaults
    if float64 != "float32":
        raise InputError(f"{float64=} chooses among the default passes. With passes=, leave narrow_float64 out of it.")
    passes = list(passes)
    if wrong := [pass_ for pass_ in passes if not callable(pass_)]:
        raise InputError(f"{wrong[0]!r} in passes= is no pass: a pass takes a torch.fx.GraphModule and returns one.")
    return passes


@torch.inference_mode(False)
@torch.no_grad()  # autograd would keep what constants are computed from
def run(graph: torch.fx.GraphModule, passes: Iterable[Pass]) -> torch.fx.GraphModule:
    """What the passes make of a graph, one after the other; raises `InputError` for a pass that leaves a broken one."""
    for pass_ in passes:
        graph = pass_(graph)
        try:
            check_graph(graph)
        except InputError as error:
            name = getattr(pass_, "__name__", type(pass_).__name__)
            raise InputError(f"The pass '{name}' leaves a broken graph. {error}") from error
    return graph
