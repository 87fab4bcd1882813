"""A file of weights for a module: what torch.save or safetensors has written of a state dict."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch

from torch2rt.usage import Failure, UsageError, one_line

INSIDE = ("state_dict", "model_state_dict", "model")  # where checkpoints have the state dict beside other things
WRAPPER = "module."  # before every name, if torch.nn.DataParallel was saved


def load_weights(module: torch.nn.Module, path: str) -> None:
    """Give a module the weights of a file, all of them and no others; raises `UsageError` or `Failure`."""
    state = _read(path)
    own = module.state_dict().keys()
    if all(name.startswith(WRAPPER) for name in state) and not any(name.startswith(WRAPPER) for name in own):
        state = {name.removeprefix(WRAPPER): value for name, value in state.items()}
    missing, unknown = own - state.keys(), state.keys() - own
    other = [
        f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in module.state_dict().items()
        if name in state and state[name].shape != value.shape
    ]
    problems = {"has no": sorted(missing), "has": sorted(unknown), "has other shapes:": other}
    told = [f"{what} {_some(names)}" for what, names in problems.items() if names]
    if told:
        raise Failure(f"{path} does not fit the model: it {'; it '.join(told)}.")
    try:
        module.load_state_dict(state)
    except Exception as error:
        raise Failure(f"{path} does not fit the model: {one_line(error)}.") from error


def _read(path: str) -> Mapping[str, torch.Tensor]:
    with open(path, "rb") as file:
        head = file.read(16)
    try:
        if head[8:9] == b"{":
            try:
                from safetensors.torch import load_file
            except ModuleNotFoundError as error:
                raise UsageError(f"{path} is a safetensors file: pip install safetensors") from error
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Failure(f"{path} is no file of tensors alone, which is all that is read: {one_line(error)}.") from error
    except UsageError:
        raise
    except Exception as error:  # torch.load takes what is no file of its own for a pickle
        raise Failure(f"{path} cannot be read as weights: {one_line(error)}.") from error
    if isinstance(found, Mapping) and not _is_state_dict(found):
        found = next((found[key] for key in INSIDE if key in found and _is_state_dict(found[key])), found)
    if not _is_state_dict(found):
        raise Failure(f"{path} holds a {type(found).__name__}, which is no state dict.")
    return found


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in value.items()
    )


def _some(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
