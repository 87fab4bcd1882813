"""`torch2rt inspect`: what a file of torch2rt holds, read without TensorRT and without a GPU."""

from __future__ import annotations

import collections
from typing import Any

from torch2rt.bench.models import Table, by
from torch2rt.engine import artifact
from torch2rt.engine.container import is_container, read
from torch2rt.engine.engine import Engine
from torch2rt.engine.manifest import engine_of, engines_in, readable
from torch2rt.errors import EngineError


def inspect(path: str, layers: bool) -> None:
    """Print what is known of a file; raises `EngineError` for a damaged one, and for a plain engine."""
    if is_container(path):
        return _saved(path, layers)
    data, header = artifact.load(path)
    if header is None:
        raise EngineError(
            f"{path} is a plain engine, or no engine: it lacks what TRTModule.save_engine writes after one. "
            f"{artifact.doubt(data)}TRTModule.from_engine reads it on a GPU."
        )
    saved = artifact.parse(data, header)
    show = Table(quiet=False)
    show.row("file", path, f"{len(data) / 2**20:.1f} MiB engine")
    _engine(saved, layers, show)


def _saved(path: str, layers: bool) -> None:
    """Print what is known of a file of `torch2rt.save`, all of whose digests are checked."""
    file, show = read(path), Table(quiet=False)
    with readable(file):
        module, example = file.manifest["module"], file.manifest["example"]
        size = sum(map(len, file.parts.values()))
        signed = "signed" if file.is_signed else "not signed"
        show.row("file", path, f"{size / 2**20:.1f} MiB in {len(file.parts)} parts, {signed}")
        by = file.manifest["saved_by"]
        show.row("saved by", f"torch2rt {by['torch2rt']}", f"torch {by['torch']}, CUDA {by['cuda'] or 'none'}")
        show.row("module", *_MODULES[module["kind"]])
        shown = "none" if example is None else f"{len(example['inputs'])} inputs, {len(example['outputs'])} outputs"
        show.row("example", shown, "" if example is None else f"by {example['by']}")
        for name, (dtype, shape, _) in module.get("state", {}).items():
            show.row("state", name, f"{dtype}{shape}")
        for line in module.get("header", {}).get("report", {}).get("segments", ()):
            show.row("report", line)
        nodes = engines_in(module)
        for place, node in enumerate(nodes):
            if len(nodes) > 1:
                show.row(f"engine {place}")
            engine = engine_of(file, node)
            weights = sum(len(file.part(part)) for source in node["sources"] for *_, part in source["tensors"])
            graph = f"graph and {weights / 2**20:.1f} MiB of weights" if node["sources"] else "nothing"
            show.row("engine", f"{len(engine.data) / 2**20:.1f} MiB", f"to build it again: {graph}")
            for gpu, blobs in engine.kernels.items():
                show.row("kernels", f"{sum(map(len, blobs)) / 2**20:.1f} MiB", f"for {gpu}")
            _engine(engine, layers, show)


_MODULES = {
    "engine": ("TRTModule", "an engine"),
    "partitioned": ("PartitionedModule", "engines and torch segments"),
    "stateful": ("StatefulModule", "with tensors that it keeps between calls"),
}


def _engine(saved: Engine, layers: bool, show: Table) -> None:
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
