"""The table of README.md: models of many kinds in every way to run them, at batch 1 and 16.

    python benchmarks/table.py [--rows NAME,...] [--ways A,...] [--results FOLDER] [--check]

Weights and inputs are float16 and random, but no layer is without effect and none out of range, so that the errors mean
something; what is measured, and how, is `torch2rt bench`. The results are written to FOLDER (benchmarks/results):
numbers as JSON after every batch size, the table as markdown and a picture after every row. What is there already, from
the same machine and versions, stays; so `--rows` and `--ways` can measure the table in parts. Needs a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from meter import verdict
from torch.nn.modules.batchnorm import _BatchNorm

from torch2rt.bench.benchmark import Job, benchmarks, facts
from torch2rt.bench.models import Failure, UsageError, load_model
from torch2rt.bench.report import COLUMNS, GREEN, INK, OURS, cell, remarks
from torch2rt.bench.runners import WAYS
from torch2rt.bench.worker import Measurement

VISION = ("resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t")
BATCHES = (1, 16)
TOKENS = 128
BUILD_AIM = 0.5  # of the better build of the two others that use TensorRT
PEERS = ("onnx", "torch-tensorrt")
BEST = f"{OURS} + graph"
BORROWED = f"{BEST}, borrowed"  # whose outputs the next call overwrites, as those of all other graphs are
COLORS = {
    "eager": "#8b949e",
    "eager + graph": "#4f7cac",
    "torch.compile": "#b07aa1",
    OURS: "#a5d08b",
    "onnx + graph": "#e0902f",
    "torch-tensorrt + graph": "#d1495b",
}
Row = Mapping[int, Sequence[Measurement]]  # by batch


class Bert(torch.nn.Module):
    """BERT-base with random weights: ids and attention mask in, the last hidden state out."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        self.bert = BertModel(BertConfig(), add_pooling_layer=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state


def conv_relu() -> torch.nn.Module:
    """So little work that the host's part is what counts."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())


def lively(name: str) -> torch.nn.Module:
    """A model of torchvision in which every layer matters and keeps its values in range."""
    module = load_model(f"torchvision:{name}").eval()
    awaken(module)
    settle(module, torch.randn(4, 3, 224, 224))
    return module


def lively_bert() -> torch.nn.Module:
    module = Bert().eval()
    awaken(module)
    return module


def awaken(module: torch.nn.Module) -> None:
    """New values for parameters that are zero or nearly so: such heads and layer scales hide what is before them."""
    for parameter in module.parameters():
        if parameter.detach().abs().max() < 1e-4:
            torch.nn.init.normal_(parameter.data, 0.0, 0.2)


def settle(module: torch.nn.Module, x: torch.Tensor) -> None:
    """The statistics that batch norms see in one call; those of an untrained model let values vanish."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        module(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


MODELS = SimpleNamespace(
    **{name: functools.partial(lively, name) for name in VISION}, bert=lively_bert, conv_relu=conv_relu
)


def jobs() -> dict[str, dict[int, Job]]:
    """The rows: a job for each batch size."""
    half = "float16"
    rows = {
        name: {n: Job(f"table:MODELS.{name}", [((n, 3, 224, 224), half)], half) for n in BATCHES} for name in VISION
    }
    ids = "int64"
    rows["bert"] = {n: Job("table:MODELS.bert", [((n, TOKENS), ids), ((n, TOKENS), ids)], half) for n in BATCHES}
    rows["conv + relu"] = {1: Job("table:MODELS.conv_relu", [((1, 3, 32, 32), half)], half)}
    return rows


# Results -------------------------------------------------------------------------------------------------------------


def path(folder: Path, facts: Mapping[str, Any]) -> Path:
    """The results' file, without its suffix: named by GPU and TensorRT."""
    versions = facts["versions"]
    flavour = next(name for name in ("tensorrt", "tensorrt_rtx") if name in versions)
    text = f"{facts['machine']['gpu']} {flavour} {versions[flavour]}"
    return folder / re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def load(file: Path, facts: Mapping[str, Any]) -> dict[str, dict[int, list[Measurement]]]:
    """The rows of an earlier run on the same machine, with the same versions; none if there is no such run."""
    if not file.exists():
        return {}
    data = json.loads(file.read_text())
    if {key: data[key] for key in facts} != facts:
        print(f"{file} is of another machine or other versions: its rows are dropped", file=sys.stderr)
        return {}
    return {
        name: {int(batch): [Measurement(**m) for m in ms] for batch, ms in row.items()}
        for name, row in data["rows"].items()
    }


def merge(old: Sequence[Measurement], new: Sequence[Measurement]) -> list[Measurement]:
    """The new measurements and those of other ways, in the order of `WAYS`."""
    by_way = {m.way: m for m in (*old, *new)}
    return [by_way[name] for way in WAYS.values() for name in way.variants if name in by_way]


def save(base: Path, facts: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    """The numbers, in a file that is whole at any time."""
    data = {
        name: {batch: [dataclasses.asdict(m) for m in ms] for batch, ms in row.items()} for name, row in rows.items()
    }
    base.parent.mkdir(parents=True, exist_ok=True)
    new = base.with_name(base.name + ".json.new")
    new.write_text(json.dumps({**facts, "rows": data}, indent=1) + "\n")
    os.replace(new, base.with_name(base.name + ".json"))


def show(base: Path, facts: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    """The table and the picture."""
    base.with_name(base.name + ".md").write_text(markdown(facts, rows))
    picture(base.with_name(base.name + ".png"), f"{facts['machine']['gpu']}, float16", rows)


def aims(rows: Mapping[str, Row]) -> list[tuple[bool, str]]:
    """What torch2rt means to be, row by row, and whether it is."""
    checks = []
    for name, row in rows.items():
        for batch, measurements in row.items():
            by_way = {m.way: m for m in measurements}
            if BEST not in by_way:
                continue
            field = "host" if name == "conv + relu" else "latency"
            unit, where = COLUMNS[field][1], f"{name}, batch {batch}"
            if by_way[BEST].failure is not None:
                checks.append((False, f"{where}: {BEST} failed: {by_way[BEST].failure}"))
                continue
            others = {m.way: getattr(m, field) for m in measurements if m.failure is None and OURS not in m.way}
            best = min(others, key=lambda way: others[way], default=None)
            for way, note in ((BEST, ""), (BORROWED, " with borrowed outputs")):
                if best is not None and way in by_way and (own := getattr(by_way[way], field)) is not None:
                    text = f"{COLUMNS[field][0]}{note} {own:.3f} {unit}, the best other {others[best]:.3f} ({best})"
                    checks.append((own <= others[best], f"{where}: {text}"))
            ours = by_way[OURS].build if OURS in by_way else None
            builds = {way: by_way[way].build for way in PEERS if way in by_way and by_way[way].failure is None}
            if builds and ours is not None:
                best = min(builds, key=lambda way: builds[way] or 0.0)
                limit = BUILD_AIM * (builds[best] or 0.0)
                text = f"{where}: build {ours:.2f} s, half of the better peer's is {limit:.2f} s ({best})"
                checks.append((ours <= limit, text))
    return checks


def markdown(facts: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """A table for each column of `torch2rt bench`, batch 1 and 16 in a cell, and the aims."""
    ways = list(dict.fromkeys(m.way for row in rows.values() for ms in row.values() for m in ms))
    stated = ", ".join(f"{key} {value}" for part in facts.values() for key, value in part.items() if value)
    lines = [f"float16, batch {' / '.join(map(str, BATCHES))}; {stated}."]
    failures, footnotes = [], []
    for field, (heading, unit, _) in COLUMNS.items():
        lines += ["", f"### {heading.capitalize() if heading[1:].islower() else heading} ({unit})", ""]
        lines += [f"| | {' | '.join(ways)} |", f"|---{'|---:' * len(ways)}|"]
        for name, row in rows.items():
            cells = [" / ".join(_cell(ms, way, field) for ms in row.values()) for way in ways]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, row in rows.items():
        for batch, ms in row.items():
            failures += [f"- {name}, batch {batch}, {m.way}: {m.failure}" for m in ms if m.failure is not None]
            footnotes += [f"- {name}, batch {batch}: {remark}" for remark in remarks(ms)]
    lines += ["", "### Errors that say nothing", "", *footnotes] if footnotes else []
    lines += ["", "### Failures", "", *failures] if failures else []
    lines += ["", "### Aims", "", *(f"- {'met' if met else 'missed'}: {text}" for met, text in aims(rows))]
    return "\n".join(lines) + "\n"


def _cell(measurements: Sequence[Measurement], way: str, field: str) -> str:
    found = next((m for m in measurements if m.way == way), None)
    if found is None:
        return "-"
    if found.failure is not None:
        return "failed"
    text = cell(found, field)
    if field != "latency":
        return text
    best = min(m.latency for m in measurements if m.latency is not None)
    return f"**{text}**" if found.latency == best else text


def picture(file: Path, title: str, rows: Mapping[str, Row]) -> None:
    """A dot for each way, at its latency relative to torch2rt with a graph, which is the line at 1."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = [name for name in rows if name != "conv + relu"]
    figure = Figure(figsize=(9.0, 1.5 + 0.38 * max(1, len(names))), layout="constrained")
    panels = figure.subplots(1, len(BATCHES), sharey=True, sharex=True)
    relative = {batch: {name: _relative(rows[name].get(batch, ())) for name in names} for batch in BATCHES}
    values = [x for panel in relative.values() for row in panel.values() for x in row.values()] or [1.0]
    for axes, (batch, panel) in zip(panels, relative.items(), strict=True):
        axes.axvline(1.0, color=GREEN, linewidth=3, label=BEST, zorder=1)
        for place, row in enumerate(panel.values()):
            axes.axhline(place, color=INK, linewidth=0.4, alpha=0.5, zorder=0)
            for way, color in COLORS.items():
                if way in row:
                    axes.plot(row[way], place, "o", color=color, markersize=8, label=way, zorder=2)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        axes.set_xlim(min(0.9, min(values) / 1.1), max(1.1, max(values) * 1.1))
        axes.set_title(f"batch {batch}", color=INK, fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=INK)
    panels[0].invert_yaxis()
    labels = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels())}
    order = [way for way in (BEST, *COLORS) if way in labels]
    figure.legend(
        [labels[way] for way in order], order, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK
    )
    figure.suptitle(f"Latency relative to {BEST} ({title}); further right is slower", color=INK, fontsize=11)
    figure.savefig(file, dpi=160, transparent=True)


def _relative(measurements: Sequence[Measurement]) -> dict[str, float]:
    latencies = {m.way: m.latency for m in measurements if m.latency is not None}
    return {way: value / latencies[BEST] for way, value in latencies.items()} if BEST in latencies else {}


def main(argv: Sequence[str] | None = None) -> int:
    every = jobs()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", help=f"some of {','.join(every)}, separated by commas (default: all)")
    parser.add_argument("--ways", help="some of the ways of `torch2rt bench`, separated by commas (default: all)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    parser.add_argument("--timeout", type=float, default=240.0, metavar="SECONDS", help="for each way")
    parser.add_argument("--check", action="store_true", help="exit with 1 if an aim is missed")
    arguments = parser.parse_args(argv)
    asked = arguments.rows.split(",") if arguments.rows else list(every)
    if unknown := [name for name in asked if name not in every]:
        parser.error(f"there is no row {', '.join(unknown)}")
    chosen = [name for name in every if name in asked]
    ways = arguments.ways.split(",") if arguments.ways else None
    here = facts()
    base = path(arguments.results, here)
    rows = load(base.with_name(base.name + ".json"), here)
    todo = [job for name in chosen for job in every[name].values()]
    found = benchmarks(todo, ways, together=len(BATCHES), timeout=arguments.timeout)
    seconds: dict[str, float] = {}
    try:
        for name in chosen:
            start = time.monotonic()
            for batch in every[name]:
                new = next(found)
                row = rows.setdefault(name, {})
                row[batch] = merge(row.get(batch, ()), new)
                rows = {n: dict(sorted(rows[n].items())) for n in every if n in rows}
                save(base, here, rows)
            show(base, here, rows)
            seconds[name] = time.monotonic() - start
    except (Failure, UsageError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for name, value in seconds.items():
            print(f"{name}: {value:.0f} s", file=sys.stderr)
    print(markdown(here, rows))
    return verdict(aims(rows), arguments.check)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process stays behind
    sys.exit(main())
