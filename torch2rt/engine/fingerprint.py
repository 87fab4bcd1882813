"""What an engine was built with, on and for, and how that differs from what is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from torch2rt import __version__
from torch2rt.backend.tensorrt import FLAVOUR, VERSION, builds_without_gpu
from torch2rt.engine.engine import Engine


def present(options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The versions and the GPU that are here, and the options of a build, as JSON values.

    - `gpu`: name and compute capability, `None` without a GPU.
    - `options`: as `torch2rt.build` was given them, `compute_capabilities` as a list of names.
    """
    gpu = None
    if torch.cuda.is_available():
        gpu = [torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))]
    return {
        "torch2rt": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "options": dict(options or {}),
    }


class Differences(NamedTuple):
    """How what is here differs from what an engine was built with.

    - `grave`: for which the engine cannot run here. `others`: which it does not depend on.
    """

    grave: list[str]
    others: list[str]

    def __str__(self) -> str:
        return "\n".join(f"  {text}" for text in (*self.grave, *self.others))


def differences(engine: Engine) -> Differences:
    """Where this machine and what is installed on it differ from what an engine was built with."""
    grave, others = [], []
    made_by, built, here = engine.made_by, engine.facts.get("built", {}), present()
    theirs, ours = (f"{made_by.get('flavour')} {made_by.get('version')}", f"{FLAVOUR} {VERSION}")
    if theirs != ours:
        grave.append(f"TensorRT: built by {theirs}, here is {ours}")
    gpu, there = here["gpu"], built.get("gpu")
    asked = built.get("options", {}).get("compute_capabilities")
    if gpu is not None and asked and asked != ["current"] and builds_without_gpu():
        if gpu[1] not in asked and "current" not in asked:
            grave.append(f"GPU: built for compute capability {', '.join(asked)}, here is {gpu[0]} ({gpu[1]})")
    elif gpu is not None and there is not None and (asked == ["current"] or not builds_without_gpu()):
        if gpu[1] != there[1]:
            grave.append(f"GPU: built for {there[0]} ({there[1]}), here is {gpu[0]} ({gpu[1]})")
        elif gpu[0] != there[0]:
            others.append(f"GPU: built on {there[0]}, here is {gpu[0]}")
    for name in ("cuda", "torch", "torch2rt"):
        if name in built and built[name] != here[name]:
            others.append(f"{name}: {built[name]} when it was built, here is {here[name]}")
    return Differences(grave, others)
