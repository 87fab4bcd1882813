"""A calibration in a file: torch2rt's own table as JSON, or TensorRT's calibration cache."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.backend.tensorrt import VERSION
from torch2rt.callables import qualified_name
from torch2rt.errors import InputError
from torch2rt.graph import graph_meta
from torch2rt.passes.precision_rules import name_of
from torch2rt.passes.quantization.quantized import INT8

FORMAT = "torch2rt calibration 1"


def names(graph: torch.fx.GraphModule, nodes: Sequence[Node]) -> dict[str, Node]:
    """Nodes by the names that they have in a file: an input's, or the module's path and the function, and a number."""
    inputs, found, counts = graph_meta(graph).interface.inputs, {}, dict[str, int]()
    wanted = set(nodes)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            stem = inputs[node.meta["input"]].name
        elif node.op == "call_function" and "module" in node.meta:
            stem = f"{node.meta['module']}.{name_of(node.target) or 'call'}".lstrip(".")
        else:
            continue
        count = counts[stem] = counts.get(stem, -1) + 1
        if node in wanted:
            found[f"{stem}.{count}" if count else stem] = node
    return found


def fingerprint(graph: torch.fx.GraphModule) -> str:
    """What tells a graph from others: its calls and the shapes of its constants, not their numbers or dynamic sizes."""
    numbers: dict[Node, int] = {}
    lines = []
    for node in graph.graph.nodes:
        numbers[node] = len(numbers)
        if node.op == "get_attr":
            lines.append(f"constant {getattr(node.meta['val'], 'dtype', '')} {getattr(node.meta['val'], 'shape', '')}")
        elif node.op == "call_function":
            arguments = ", ".join(str(numbers[n]) for n in node.all_input_nodes)
            lines.append(f"{qualified_name(node.target)}({arguments})")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def save(
    path: Any, graph: torch.fx.GraphModule, nodes: Sequence[Node], found: Mapping[str, float], method: str
) -> None:
    """Write a calibration: as JSON, to be read and edited, if the file's name ends so, else as TensorRT does."""
    table = {name: found[node.name] for name, node in names(graph, nodes).items()}
    if Path(path).suffix == ".json":
        facts = {"format": FORMAT, "graph": fingerprint(graph), "method": method, "largest": table}
        text = json.dumps(facts, indent=2) + "\n"
    else:
        kind = "MinMaxCalibration" if method == "minmax" else "EntropyCalibration2"
        scales = (f"{name}: {struct.pack('>f', value / INT8).hex()}" for name, value in table.items())
        text = "\n".join([f"TRT-{VERSION.replace('.', '')}-{kind}", *scales]) + "\n"
    Path(path).write_text(text, encoding="utf-8")


def load(path: Any, graph: torch.fx.GraphModule, nodes: Sequence[Node]) -> dict[str, float]:
    """The largest values of nodes, by the nodes' names, from a file of either kind.

    Raises `InputError` for a file that belongs to another graph, or lacks one of the values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"calibration_cache={str(path)!r} cannot be read: {error}.") from error
    table = _of_tensorrt(path, text) if text.startswith("TRT-") else _of_json(path, text, graph)
    wanted = names(graph, nodes)
    missing = [name for name in wanted if name not in table]
    if missing:
        raise InputError(
            f"calibration_cache={str(path)!r} belongs to another module, or to other passes: it has no "
            f"{', '.join(map(repr, missing[:5]))}{' ...' * (len(missing) > 5)}. Delete it to calibrate anew."
        )
    return {node.name: table[name] for name, node in wanted.items()}


def _of_json(path: Any, text: str, graph: torch.fx.GraphModule) -> dict[str, float]:
    try:
        facts = json.loads(text)
        is_ours = facts["format"] == FORMAT
        table = {str(name): float(value) for name, value in facts["largest"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"calibration_cache={str(path)!r} is no calibration: {type(error).__name__}: {error}."
        ) from error
    if not is_ours:
        raise InputError(f"calibration_cache={str(path)!r} has the format {facts['format']!r}, expected {FORMAT!r}.")
    if facts.get("graph") != fingerprint(graph):
        raise InputError(f"calibration_cache={str(path)!r} belongs to another module. Delete it to calibrate anew.")
    return table


def _of_tensorrt(path: Any, text: str) -> dict[str, float]:
    """Each line is a name and, in hexadecimal, the bytes of a float32 scale, the most significant first."""
    table = {}
    for number, line in enumerate(text.splitlines()[1:], 2):
        if not line.strip():
            continue
        name, _, scale = line.rpartition(":")
        try:
            table[name.strip()] = struct.unpack(">f", bytes.fromhex(scale.strip()))[0] * INT8
        except (ValueError, struct.error) as error:
            raise InputError(f"calibration_cache={str(path)!r}, line {number}: {line!r} is no scale.") from error
    return table
