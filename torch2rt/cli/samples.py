"""A file of inputs for a module, to calibrate on: what torch.save, numpy or safetensors has written."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torch2rt.usage import Failure, UsageError, one_line


def load_samples(path: str, module: torch.nn.Module) -> list[list[torch.Tensor]]:
    """The batches in a file, each a tensor for each of the module's inputs; raises `UsageError` or `Failure`.

    A file is one batch, or with torch.save a list of them. A batch is one tensor, a list of tensors in the order of the
    inputs, or a dict of them by the names of forward's parameters.
    """
    found = _read(path)
    batches = found if isinstance(found, (list, tuple)) else [found]
    return [_in_order(path, batch, module) for batch in batches]


def _in_order(path: str, batch: Any, module: torch.nn.Module) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        parameters = [name for name in inspect.signature(module.forward).parameters if name in batch]
        if unknown := [name for name in batch if name not in parameters]:
            raise Failure(f"{path} has {unknown[0]!r}, which is no parameter of the model's forward.")
        batch = [batch[name] for name in parameters]
    if not isinstance(batch, (list, tuple)) or not all(isinstance(x, torch.Tensor) for x in batch):
        raise Failure(f"{path} holds a {type(batch).__name__} where a batch of tensors is expected.")
    return list(batch)


def _read(path: str) -> Any:
    kind = Path(path).suffix.lower()
    try:
        if kind in (".npy", ".npz"):
            import numpy as np

            found = np.load(path, allow_pickle=False)
            arrays = {name: torch.from_numpy(found[name]) for name in found.files} if kind == ".npz" else None
            return torch.from_numpy(found) if arrays is None else arrays
        if kind == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ModuleNotFoundError as error:
                raise UsageError(f"{path} is a safetensors file: pip install safetensors") from error
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        raise Failure(f"{path} is no file of tensors alone, which is all that is read: {one_line(error)}.") from error
    except Exception as error:
        raise Failure(f"{path} cannot be read as inputs: {one_line(error)}.") from error
