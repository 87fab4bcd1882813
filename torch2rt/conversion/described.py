"""The segments of a graph in words."""

from __future__ import annotations

from collections.abc import Sequence

from torch2rt.lowering_errors import NO_CONVERTER
from torch2rt.passes.partitioning.partition import Segment, describe_target


def describe_segments(segments: Sequence[Segment]) -> list[str]:
    """A line for each segment: where it runs, what is in it, and why."""
    lines = []
    for index, segment in enumerate(segments):
        where = "torch" if segment.is_torch else "TensorRT"
        line = f"segment {index}: {where}, {count(segment.calls, 'call')}{_extent(segment)}"
        if segment.is_torch:
            line += f": {'; '.join(_reasons(segment)) or 'too few for an engine'}"
        lines.append(line)
    return lines


def _reasons(segment: Segment) -> list[str]:
    """The calls of a torch segment that are there for a reason of their own, with the place and the reason.

    Where a call of the module is several in the graph, the first reason that says more than that there is no converter.
    """
    found: dict[str, str] = {}
    for node, reason in segment.reasons.items():
        *_, text = reason.strip().splitlines()
        why = text.strip().partition("): ")[2] or text.strip()  # an error describes the call first
        place = f" at {node.meta['source']}" if node.meta["source"] else ""
        call = f"{describe_target(node)}{place}"
        if found.get(call, NO_CONVERTER) == NO_CONVERTER:
            found[call] = why.partition(". ")[0].removesuffix(".")
    return [f"{call} ({why})" for call, why in found.items()]


def _extent(segment: Segment) -> str:
    """The modules that a segment's calls are of, the first and the last."""
    paths = list(dict.fromkeys(node.meta["module"] for node in segment.nodes if node.meta["module"]))
    return f" of {paths[0]}" + (f" to {paths[-1]}" if len(paths) > 1 else "") if paths else ""


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
