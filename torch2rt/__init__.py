"""torch2rt: a PyTorch module in, a TensorRT engine that is still an `nn.Module` out.

>>> from torch2rt import torch2rt
>>> model_trt = torch2rt(model, [x])      # trace, lower, build, wrap       # doctest: +SKIP
>>> y = model_trt(x)                      # torch CUDA tensors in and out   # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch2rt import debug as debug
    from torch2rt import passes as passes
    from torch2rt.background.module import BackgroundModule as BackgroundModule
    from torch2rt.convert import torch2rt as torch2rt
    from torch2rt.engine.build import build as build
    from torch2rt.engine.engine import Engine as Engine
    from torch2rt.errors import AccuracyError as AccuracyError
    from torch2rt.errors import BuildError as BuildError
    from torch2rt.errors import ConversionError as ConversionError
    from torch2rt.errors import EngineError as EngineError
    from torch2rt.errors import InputError as InputError
    from torch2rt.errors import RefitError as RefitError
    from torch2rt.errors import Torch2RTError as Torch2RTError
    from torch2rt.errors import TraceError as TraceError
    from torch2rt.errors import UnsupportedError as UnsupportedError
    from torch2rt.lowering import lower as lower
    from torch2rt.planning import plan as plan
    from torch2rt.registry import converter as converter
    from torch2rt.runtime.graph_cache import GraphCache as GraphCache
    from torch2rt.runtime.module import TRTModule as TRTModule
    from torch2rt.runtime.partitioned.segments import PartitionedModule as PartitionedModule
    from torch2rt.saving import load as load
    from torch2rt.saving import save as save
    from torch2rt.submodules import convert_submodules as convert_submodules
    from torch2rt.tracing.record_shapes import record_shapes as record_shapes
    from torch2rt.tracing.trace import trace as trace
    from torch2rt.tracing.whole_calls import graph_break as graph_break

__version__ = "0.1.0"

_HOMES = {
    "torch2rt": "convert",
    "trace": "tracing.trace",
    "lower": "lowering",
    "build": "engine.build",
    "Engine": "engine.engine",
    "TRTModule": "runtime.module",
    "PartitionedModule": "runtime.partitioned.segments",
    "BackgroundModule": "background.module",
    "convert_submodules": "submodules",
    "graph_break": "tracing.whole_calls",
    "plan": "planning",
    "GraphCache": "runtime.graph_cache",
    "record_shapes": "tracing.record_shapes",
    "converter": "registry",
    "plugin": "vocabulary.plugins",
    "torch_plugin": "vocabulary.plugins",
    "save": "saving",
    "load": "saving",
    **dict.fromkeys(
        ["Torch2RTError", "ConversionError", "TraceError", "UnsupportedError", "BuildError", "AccuracyError"]
        + ["InputError", "EngineError", "RefitError"],
        "errors",
    ),
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import on first use, so that `torch2rt doctor` can speak where TensorRT is missing."""
    if name in ("passes", "debug"):
        return importlib.import_module(f"torch2rt.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'torch2rt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"torch2rt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
