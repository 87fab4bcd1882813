"""What the manifest of a file of `torch2rt.save` says of its engines; reading it needs no TensorRT."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch2rt.engine.artifact import of_description
from torch2rt.engine.container import Container
from torch2rt.engine.engine import Engine
from torch2rt.errors import EngineError, Torch2RTError

KIND = "torch2rt"


@contextlib.contextmanager
def readable(file: Container) -> Iterator[None]:
    """Raise `EngineError` where the values of a file make no sense, as they may in one that was made to harm."""
    try:
        if file.manifest["kind"] != KIND:
            raise EngineError(f"{file.name} is a file of another kind, {file.manifest['kind']!r}.")
        yield
    except Torch2RTError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise EngineError(f"{file.name} makes no sense ({type(error).__name__}: {error}).") from error


def engine_of(file: Container, node: Mapping[str, Any]) -> Engine:
    """An engine, whose plan is memory of the file."""
    plan = file.part(node["plan"]).toreadonly()
    kernels = {gpu: [file.part(name).toreadonly() for name in names] for gpu, names in node["kernels"].items()}
    engine = dataclasses.replace(of_description(plan, node["engine"]), kernels=kernels)
    if sum(variant.size for variant in engine.variants) not in (0, len(plan)):
        raise EngineError(f"{file.name} is damaged: its engines have not the sizes that it states.")
    return engine


def engines_in(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The engines among the values of a module."""
    if node["kind"] == "engine":
        return [node]
    inner = [*node.get("segments", ()), *node.get("eager", ())]
    inner += [node["converted"]] if "converted" in node else []
    return [found for part in inner for found in engines_in(part)]
