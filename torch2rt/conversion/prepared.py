"""A traced graph made ready to be lowered, in the types that are asked for, and what it is compared with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from torch2rt.debug.inputs import first_calls
from torch2rt.debug.retyped import AsModule, Retyped, distance, retyped
from torch2rt.graph import graph_meta
from torch2rt.passes.options import Precision
from torch2rt.passes.order import Pass, run
from torch2rt.recipes.tape import unrecorded
from torch2rt.tracing.source_lines import modules_of

Tensors = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One graph on its way to an engine.

    - `graph`: what is lowered after `passes` have run over it.
    - `module`, `tensors`: what the engine is compared with, on which inputs. `notes` are for the report.

    The roundings of an engine in a low precision are those of its own graph. An engine with quantised products is right
    if it computes what the quantised graph does; how far that is from the module is a note.
    """

    graph: torch.fx.GraphModule
    passes: Sequence[Pass]
    module: torch.nn.Module
    tensors: Tensors
    notes: Sequence[str] = ()


def prepare(
    traced: torch.fx.GraphModule,
    passes: Sequence[Pass],
    precise: Precision,
    module: torch.nn.Module,
    tensors: Tensors,
    progress: bool | None = None,
    is_one_of_several: bool = False,
) -> Prepared:
    """A traced graph of a module, with the passes that its precision asks for after the others."""
    if not precise.changes:
        return Prepared(traced, passes, module, tensors)
    examples = functools.partial(_examples, tensors)
    more = precise.passes(modules_of(module), examples, progress, is_one_of_several)
    graph, low = run(traced, [*passes, *more]), [retyped(x, precise.io or x.dtype) for x in tensors]
    if precise.format is not None:
        with unrecorded():
            notes = [text for example in examples(traced) for text in distance(graph, traced, example)]
        return Prepared(graph, [], AsModule(graph), low, notes)
    return Prepared(graph, [], module if precise.io is None else Retyped(module, precise.io), low)


def _examples(tensors: Tensors, graph: torch.fx.GraphModule) -> list[Tensors]:
    """The example's tensors, at sizes that the engine serves."""
    return [call.tensors for call in first_calls(graph_meta(graph).interface, tensors, is_slow=False)[:1]]
