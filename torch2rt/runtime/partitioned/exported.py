"""Torch segments as data: exported programs, whose archives are looked through before torch reads them.

`torch.export.load` unpickles some members of an archive, and a pickle can run code. So an archive with other members
than a graph in JSON and raw tensors is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from typing import Any

import torch

from torch2rt.errors import EngineError
from torch2rt.interface import Interface
from torch2rt.python_calls import PythonCall

# Members of an archive without code; `\d` and names are those of `torch.export.save`.
_ALLOWED = re.compile(
    r"[^/]+/(models/[\w.]+\.json|data/(weights|constants)/([\w.]+_config\.json|weight_\d+|tensor_\d+)"
    r"|archive_(format|version)|byteorder|version|\.data/(version|serialization_id)|\.format_version|\.storage_alignment)"
)
_SAMPLES = re.compile(r"[^/]+/data/sample_inputs/[\w.]+\.pt")


def dump(graph: torch.nn.Module, interface: Interface, device: torch.device) -> bytes:
    """The archive of a segment's calls; raises `EngineError` for calls that torch cannot export."""
    graphs = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    if any(isinstance(node.target, PythonCall) for one in graphs for node in one.graph.nodes):
        raise EngineError(
            "A torch segment that has a generator, sets the seed of one, or runs Python that cannot be traced, cannot "
            "be saved without code."
        )
    inputs = interface.inputs  # torch takes a size of 1 for a constant
    shapes = [spec.opt for spec in inputs]
    if any(spec.opt[axis] < 2 for spec in inputs for axis in spec.dynamic):
        shapes = [spec.max for spec in inputs]
    examples = [
        torch.zeros(shape, dtype=spec.dtype, device=device).contiguous(memory_format=spec.memory_format)
        for spec, shape in zip(inputs, shapes, strict=True)
    ]
    dynamic = tuple(dict.fromkeys(spec.dynamic, torch.export.Dim.AUTO) for spec in inputs)
    try:
        with torch.no_grad():
            ranges = (dynamic,) if examples else None  # torch cannot be told of no shapes
            program = torch.export.export(graph, (tuple(examples),), dynamic_shapes=ranges, strict=False)
        _check_meaning(graph, program)
        _allow_few(program)
        program.example_inputs = None  # torch would pickle them
        file = io.BytesIO()
        torch.export.save(program, file)
        _check(file.getvalue())
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(
            f"A torch segment cannot be saved without code: torch.export refuses it ({type(error).__name__}: {error})."
        ) from error
    return file.getvalue()


def _check_meaning(graph: torch.nn.Module, program: torch.export.ExportedProgram) -> None:
    """Refuse a program that lacks what a function of torch2rt computes.

    Such functions, of which `recurrent` is one, are recorded as one call, and give memory without values for tensors
    without values, which is all that torch.export sees of them.
    """
    calls = getattr(graph, "calls", graph)
    nodes = calls.graph.nodes if isinstance(calls, torch.fx.GraphModule) else ()
    own = [n.target for n in nodes if str(getattr(n.target, "__module__", "")).startswith("torch2rt.")]
    if own and any(str(n.target).startswith(_WITHOUT_VALUES) for n in program.graph.nodes):
        names = ", ".join(dict.fromkeys(function.__name__ for function in own))
        raise EngineError(
            f"A torch segment that calls {names} cannot be saved: torch.export does not see what it does."
        )


_WITHOUT_VALUES = tuple(f"aten.{name}." for name in ("empty", "empty_like", "empty_strided", "new_empty"))


def _allow_few(program: torch.export.ExportedProgram) -> None:
    """Remove the assertions that a size that depends on values is at least 2, which some fake kernels make for torch.

    torchvision's for `nms` is one. No call of a segment depends on it: there is no Python in it.
    """
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        if re.search(r"expression u\d+ >= 2 ", str(node.args[1])):
            program.graph.erase_node(node)
    program.graph_module.recompile()


def load(data: bytes) -> torch.export.ExportedProgram:
    """The program in an archive; raises `EngineError` for one that is damaged, or could run code when it is read."""
    _check(data)
    try:
        return torch.export.load(io.BytesIO(data))
    except Exception as error:
        raise EngineError(
            f"A torch segment cannot be read ({type(error).__name__}: {error}). The libraries whose operators it calls "
            "must be imported before."
        ) from error


def _check(data: bytes) -> None:
    """Refuse an archive with members that torch might unpickle."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                if _SAMPLES.fullmatch(member.filename) and not member.file_size:
                    continue
                if not _ALLOWED.fullmatch(member.filename):
                    raise EngineError(f"A torch segment's archive holds '{member.filename}', which may be code.")
                if member.filename.endswith("_config.json"):
                    _check_tensors(member.filename, json.loads(archive.read(member)))
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"A torch segment's archive is damaged: {error}.") from error


def _check_tensors(name: str, listed: Any) -> None:
    entries = listed.get("config", {}) if isinstance(listed, dict) else None
    if not isinstance(entries, dict):
        raise EngineError(f"A torch segment's archive is damaged: '{name}' lists no tensors.")
    for key, entry in entries.items():
        plain = isinstance(entry, dict) and entry.get("use_pickle") is False
        if not plain or not re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name"))):
            raise EngineError(f"A torch segment's archive holds '{key}' in a form that may be code.")
