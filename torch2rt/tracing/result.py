"""What a module returned to a trace, and the end of the graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import _pop_mode_temporarily

from torch2rt.arguments import given_names
from torch2rt.errors import InputError, TraceError
from torch2rt.interface import Interface
from torch2rt.passes.value_numbers import value_numbers
from torch2rt.sizes import expression, is_symbolic, to_json
from torch2rt.structure import Spec, flatten
from torch2rt.tracing.recorder import Recorder
from torch2rt.tracing.signature import distinct
from torch2rt.tracing.tracer import Tracer


@dataclass
class Result:
    """What a module returned: the nodes of its tensors and its symbolic sizes, and how they nest."""

    leaves: list[Any]
    structure: Spec

    @classmethod
    def of(cls, tracer: Tracer, value: Any) -> Result:
        leaves, structure = flatten(value, lambda v: isinstance(v, torch.Tensor) or is_symbolic(v), "result")
        with _pop_mode_temporarily():  # the tracer's: a view is looked up again by calls that are not the module's
            return cls([leaf if is_symbolic(leaf) else tracer.values.argument(leaf) for leaf in leaves], structure)

    def is_same(self, other: Result, recorder: Recorder) -> bool:
        """Whether another result is the same computation."""
        if json.dumps(self.structure) != json.dumps(other.structure):
            return False
        numbers = value_numbers(recorder.graph, recorder.constants.held.__getitem__)
        ours, theirs = (
            [expression(leaf) if is_symbolic(leaf) else numbers[leaf] for leaf in result.leaves]
            for result in (self, other)
        )
        return ours == theirs


def end_graph(interface: Interface, recorder: Recorder, result: Result, names: str | Sequence[str] | None) -> Interface:
    """End the graph with the result's tensors; returns the interface with its outputs."""
    nodes: list[torch.fx.Node] = []
    leaves: list[dict[str, Any]] = []
    for leaf in result.leaves:
        if is_symbolic(leaf):
            leaves.append({"size": to_json(expression(leaf), recorder.symbols)})
            continue
        if leaf not in nodes:
            nodes.append(leaf)
        leaves.append({"output": nodes.index(leaf)})
    if not nodes:
        raise TraceError("The module returns no tensor, so there is nothing for an engine to compute.")
    taken = {spec.name for spec in interface.inputs}
    names = given_names("output_names", names)
    if names is None:
        names = distinct((f"output_{i}" for i in range(len(nodes))), taken)
    if len(names) != len(nodes):
        raise InputError(f"output_names has {len(names)} names for {len(nodes)} output tensors: {names}.")
    if len({*names, *taken}) != len(names) + len(taken) or not all(names):
        raise InputError(
            f"output_names must be distinct, not empty and no input's name: {names}, inputs {sorted(taken)}."
        )
    recorder.graph.output(tuple(nodes))
    return replace(interface, outputs=names, result=result.structure, leaves=leaves)
