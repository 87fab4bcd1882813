"""What the commands share: models by name, inputs to try them with, the errors that end a command, its table."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from torch2rt.structure import bare_name
from torch2rt.usage import Failure, Shape, UsageError, one_line


def load_model(spec: str) -> torch.nn.Module:
    """The module that a MODEL argument names, with random weights or those that it gives itself.

    Raises `UsageError` for a MODEL that there is not, and `Failure` where the user's own Python fails.
    """
    source, _, name = spec.partition(":")
    if not source or not name:
        raise UsageError(f"MODEL {spec!r} is none of torchvision:NAME, timm:NAME and package.module:NAME.")
    if source == "torchvision":
        return _torchvision(name)
    if source == "timm":
        return _timm(name)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(source)
    except ModuleNotFoundError as error:
        if not (source + ".").startswith(f"{error.name}."):
            raise Failure(f"MODEL {spec!r}: importing {source} fails: {one_line(error)}.") from error
        raise UsageError(f"MODEL {spec!r}: there is no module {error.name!r} here.") from error
    except Exception as error:
        raise Failure(f"MODEL {spec!r}: importing {source} fails: {one_line(error)}.") from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise UsageError(f"MODEL {spec!r}: {source} has no {name!r}.")
        value = getattr(value, part)
    if not isinstance(value, torch.nn.Module):
        if not callable(value):
            raise UsageError(f"MODEL {spec!r} is a {type(value).__name__}, neither an nn.Module nor callable.")
        try:
            value = value()
        except Exception as error:
            raise Failure(f"MODEL {spec!r}: calling {name} fails: {one_line(error)}.") from error
    if not isinstance(value, torch.nn.Module):
        raise UsageError(f"MODEL {spec!r} returns a {type(value).__name__}, not an nn.Module.")
    return value


def _torchvision(name: str) -> torch.nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise UsageError(f"torchvision has no model {name!r}.{_similar(name, models.list_models())}")
    takes = inspect.signature(models.get_model_builder(name)).parameters
    return models.get_model(name, weights=None, **{k: None for k in ("weights_backbone",) if k in takes})


def _timm(name: str) -> torch.nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UsageError("timm is not installed: pip install timm") from error
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}.{_similar(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False)


def _similar(name: str, names: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def example(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Values to try a model with; integers are 0 or 1, which every embedding has."""
    if dtype.is_floating_point:
        return torch.randn(shape).to(device, dtype)
    return torch.randint(0, 2, shape).to(device, dtype)


def require_tensorrt() -> None:
    """Say what is missing before anything takes time."""
    try:
        importlib.import_module("torch2rt.backend.tensorrt")
    except ImportError as error:
        raise Failure(str(error)) from error


def check_inputs(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Tell inputs that the model does not take from other failures; raises `UsageError` for them."""
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception as error:
        given = ", ".join(f"{bare_name(x.dtype)} {by(x.shape)}" for x in inputs)
        raise UsageError(f"the model itself fails on {given}: {one_line(error)}") from error


def by(shape: Sequence[int]) -> str:
    """A shape as the command line takes it."""
    return "x".join(map(str, shape)) or "scalar"


class Table:
    """Rows of three columns, printed as they come."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def row(self, *columns: str) -> None:
        if not self.quiet:
            first, *rest = columns
            print(f"{first:<10} {'  '.join(f'{c:<24}' for c in rest)}".rstrip(), flush=True)
