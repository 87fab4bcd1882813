"""What TensorRT makes of a network, without a GPU: the kernels in the build's verbose log."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

from torch2rt import build
from torch2rt.backend.tensorrt import trt


@dataclasses.dataclass
class Kernel:
    """A kernel of the engine: its name and type, and the types of what it reads (constants apart) and writes."""

    name: str
    type: str
    inputs: list[str]
    constants: list[str]
    outputs: list[str]

    def __str__(self) -> str:
        return f"{self.name} {self.type} {self.inputs} {self.constants} -> {self.outputs}"


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(1)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def kernels(network: Any) -> list[Kernel]:
    """The kernels of the engine that TensorRT builds of a network of `torch2rt.lower`."""

    def detailed(config: Any) -> None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    log, logger = _Log(), logging.getLogger("torch2rt")
    before = logger.level, logger.propagate
    logger.addHandler(log)
    logger.setLevel(1)
    logger.propagate = False
    try:
        build(network, log_level="verbose", configure=detailed)
    finally:
        logger.removeHandler(log)
        logger.setLevel(before[0])
        logger.propagate = before[1]
    (text,) = (message for message in log.messages if message.startswith("Layers:"))
    return [_kernel(line) for line in text.splitlines() if line.startswith("Name: ")]


def _kernel(line: str) -> Kernel:
    name, kind = re.match(r"Name: (.*?), LayerType: (\w+)", line).groups()  # type: ignore[union-attr]
    parts = [re.search(rf"{what}: \[(.*?)\], {then}", line) for what, then in _PARTS]
    return Kernel(name, kind, *(re.findall(r"Datatype: (\w+)", part.group(1)) if part else [] for part in parts))


_PARTS = (("Inputs", "Constants"), ("Constants", "Outputs"), ("Outputs", "TacticName"))
