"""Engines that outlive the process, in the folder of `torch2rt.backend.disk_cache`: the second conversion builds none.

An engine's file is named after a key of all that it depends on: the graph with its constants' contents, the TensorRT
that builds it, the options, the GPU it is for, and the code of torch2rt.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from torch2rt.backend import disk_cache
from torch2rt.backend.float32 import convolutions_in_tf32, products_in_tf32
from torch2rt.backend.quirks import builds_refittable
from torch2rt.backend.tensorrt import FLAVOUR, VERSION, builds_without_gpu
from torch2rt.engine import artifact
from torch2rt.engine.build import capabilities_asked
from torch2rt.engine.engine import Engine
from torch2rt.engine.report import Report
from torch2rt.errors import EngineError
from torch2rt.graph_key import Unkeyable, content, graph_key, own_code

LOGGER = logging.getLogger("torch2rt")
ENVIRONMENT = "TORCH2RT_CACHE_ENGINES"  # "0" keeps none
KIND = "engine"
EARLIER = "This was done by an earlier conversion of the same module, which has kept the engine."
AGAIN = "Convert again with the environment variable TORCH2RT_CACHE_ENGINES=0 for an engine with its network."
NO_EFFECT = frozenset({"log_level", "progress", "configure"})


def file_of(
    graph: torch.fx.GraphModule,
    options: Mapping[str, Any],
    nan: str = "keep",
    refittable: bool = False,
    constant: Callable[[torch.Tensor], str | None] = content,
    *more: Any,
    kind: str = KIND,
) -> Path | None:
    """The file of the engine that would be built of a graph after its passes; `None` where none is kept.

    `options` are those of `torch2rt.build`. With `configure`, and for functions that another process would not know,
    there is no key. `constant` is as for `graph_key`, and `kind` is what the file holds.
    """
    if disk_cache.folder() is None or os.environ.get(ENVIRONMENT) == "0" or options.get("configure") is not None:
        return None
    asked = {name: value for name, value in options.items() if name not in NO_EFFECT}
    asked["compute_capabilities"] = capabilities_asked(options.get("compute_capabilities"))
    try:
        key = graph_key(graph, constant, nan, refittable and builds_refittable(), asked, _surroundings(asked), *more)
    except Unkeyable as why:
        LOGGER.debug("no engine is kept: the graph has %s", why)
        return None
    return disk_cache.of_key(kind, key)


def _surroundings(asked: Mapping[str, Any]) -> list[str]:
    """What an engine depends on beside its graph and the options."""
    torch_is = [products_in_tf32(), convolutions_in_tf32(), torch.get_default_dtype()]
    facts = [FLAVOUR, VERSION, torch.__version__, torch.version.cuda, own_code(), *torch_is]
    facts.append(os.environ.get("NVIDIA_TF32_OVERRIDE"))
    capabilities = [str(c).lower() for c in asked["compute_capabilities"]]
    if not builds_without_gpu() or "current" in capabilities:
        facts += disk_cache.gpu() if torch.cuda.is_available() else ["no GPU"]
    return list(map(str, facts))


def read(file: Path | None) -> Engine | None:
    """The engine in a file; `None` if there is none, or the file is damaged, which is logged with its name."""
    if file is None or not os.path.lexists(file):
        return None
    kept = disk_cache.read(file)
    try:
        if kept is None:
            raise EngineError("the file is damaged, not readable, or another's")
        data, header = artifact.split(kept)
        engine = artifact.of_description(data, artifact.unseal(header, artifact.KEYS))
        if (engine.made_by.get("flavour"), engine.made_by.get("version")) != (FLAVOUR, VERSION):
            raise EngineError("another TensorRT has built it")
        return engine
    except (EngineError, ValueError) as error:
        if os.path.lexists(file):  # else another process has removed it
            LOGGER.warning("The cached engine %s is not used, and built again: %s", file, error)
            disk_cache.remove(file)
        return None


def write(file: Path | None, engine: Engine) -> bool:
    """Keep an engine, and say whether that was possible."""
    if file is None:
        return False
    header = artifact.header(engine, artifact.digest(engine.data))
    end = header + len(header).to_bytes(8, "little") + artifact.MAGIC
    return disk_cache.write(file, engine.data, end)


def is_verified(report: Report, mode: bool | str) -> bool:
    """Whether what is kept was compared with its module as it is asked for."""
    found = report.verified
    return not mode or found is not None and (mode != "range" or found.mode == "range")
