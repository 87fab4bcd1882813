"""Measurements as a table, a file of JSON and a picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch2rt.bench.benchmark import Job
from torch2rt.bench.models import UsageError
from torch2rt.bench.worker import Measurement

COLUMNS = {  # the field: heading, unit, format
    "latency": ("latency", "ms", ".3f"),
    "throughput": ("throughput", "samples/s", ".1f"),
    "host": ("host time", "us", ".1f"),
    "build": ("build", "s", ".2f"),
    "memory": ("GPU memory", "MiB", ".0f"),
    "error": ("error", "relative", ".1e"),
}
OURS = "torch2rt"
GREEN, GREY, INK = "#4c9a2a", "#9aa1a9", "#7d848c"  # all three can be read on white and on black


def table(measurements: Sequence[Measurement]) -> str:
    """A line for each way; what a column means is said at `Measurement`."""
    width = max([22, *(len(m.way) for m in measurements)])
    lines = [
        " " * width + "".join(f"{heading:>13}" for heading, _, _ in COLUMNS.values()),
        " " * width + "".join(f"{unit:>13}" for _, unit, _ in COLUMNS.values()),
    ]
    for m in measurements:
        if m.failure is not None:
            lines.append(f"{m.way:<{width}} failed: {m.failure}")
        else:
            cells = (cell(m, field) for field in COLUMNS)
            lines.append(f"{m.way:<{width}}" + "".join(f"{text:>13}" for text in cells))
    return "\n".join(lines + remarks(measurements))


def cell(measurement: Measurement, field: str) -> str:
    """A number as its column has it, `-` where there is none."""
    value = getattr(measurement, field)
    return "-" if value is None else format(value, COLUMNS[field][2])


def remarks(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each reason why an error is `-`, with the ways it holds for."""
    ways: dict[str, list[str]] = {}
    for m in measurements:
        if m.remark is not None:
            ways.setdefault(m.remark, []).append(m.way)
    return [f"error - of {', '.join(names)}: {remark}" for remark, names in ways.items()]


def save(path: str | os.PathLike[str], job: Job, facts: Mapping[str, Any], measurements: Sequence[Measurement]) -> None:
    """Write a job, where it was measured, and its measurements, as JSON."""
    rows = [dataclasses.asdict(m) for m in measurements]
    Path(path).write_text(json.dumps({"job": dataclasses.asdict(job), **facts, "measurements": rows}, indent=1) + "\n")


def load(path: str | os.PathLike[str]) -> list[Measurement]:
    """The measurements of a file of `save`."""
    return [Measurement(**row) for row in json.loads(Path(path).read_text())["measurements"]]


def require_matplotlib() -> None:
    """Raise `UsageError` before anything takes time, if no picture can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib: pip install 'torch2rt[bench]'")


def picture(path: str | os.PathLike[str], title: str, measurements: Sequence[Measurement]) -> None:
    """Draw latencies as horizontal bars, torch2rt's in colour, on a transparent ground."""
    from matplotlib.figure import Figure

    shown = [m for m in measurements if m.latency is not None]
    figure = Figure(figsize=(7.2, 1.0 + 0.34 * max(1, len(shown))), layout="constrained")
    axes = figure.subplots()
    names = [m.way for m in shown]
    bars = axes.barh(names, [m.latency for m in shown], 0.72, color=[GREEN if ours(n) else GREY for n in names])
    axes.bar_label(bars, fmt="%.3g", padding=4, color=INK)
    axes.invert_yaxis()
    axes.set_title(f"{title}: latency in ms", color=INK, fontsize=10, loc="left", x=0)
    axes.margins(x=0.1)
    bare(axes)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        if ours(name):
            label.set(color=GREEN, fontweight="bold")
    figure.savefig(path, dpi=160, transparent=True)


def bare(axes: Any) -> None:
    """Nothing but the bars and their names."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.xaxis.set_visible(False)


def ours(way: str) -> bool:
    """Whether a row is torch2rt's."""
    return way.split(" ")[0] == OURS
