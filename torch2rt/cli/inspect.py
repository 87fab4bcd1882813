"""`torch2rt inspect`: what an engine file holds, read without TensorRT and without a GPU."""

from __future__ import annotations

import collections
from typing import Any

from torch2rt.bench.models import Table, by
from torch2rt.engine import artifact
from torch2rt.errors import EngineError


def inspect(path: str, layers: bool) -> None:
    """Print what is known of an engine; raises `EngineError` for a damaged file, and for a plain engine."""
    data, header = artifact.load(path)
    if header is None:
        raise EngineError(
            f"{path} is a plain engine, or no engine: it lacks what TRTModule.save_engine writes after one. "
            f"{artifact.doubt(data)}TRTModule.from_engine reads it on a GPU."
        )
    saved = artifact.parse(data, header)
    show = Table(quiet=False)
    show.row("file", path, f"{len(data) / 2**20:.1f} MiB engine")
    built = f"{saved.made_by.get('flavour', 'unknown')} {saved.made_by.get('version', '')}"
    show.row("built by", built, f"for {saved.made_by.get('target', 'an unknown GPU')}")
    for spec in saved.interface.inputs:
        show.row(
            spec.name, spec.describe(), f"optimized for {' and '.join(map(by, spec.opts))}" if spec.dynamic else ""
        )
    outputs = saved.facts.get("outputs", {})
    for name in saved.interface.outputs:
        show.row(name, outputs.get(name, "output"))
    for _, text in saved.interface.constraints:
        show.row("needs", text)
    for line in str(saved.report).splitlines():
        if not line.startswith("needs: "):  # these stand above
            show.row("report", line)
    _layers(saved.facts.get("layers"), layers, show)


def _layers(found: list[list[str]] | None, listed: bool, show: Any) -> None:
    if found is None:
        show.row("layers", "unknown")
        return
    kinds = collections.Counter(kind for _, kind in found).most_common()
    show.row("layers", str(len(found)), ", ".join(f"{count} {kind}" for kind, count in kinds))
    for name, kind in found if listed else ():
        print(f"  {kind:<20} {name}")
