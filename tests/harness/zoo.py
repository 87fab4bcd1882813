"""Whole models with random weights: converted with dynamic sizes and compared with eager at two of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from torch2rt import lower, torch2rt, trace
from torch2rt.runtime.module import ReferenceModule

DEVICES_APART = 100  # times what lies between torch on a CPU and on a GPU, for an engine on the GPU

Example = Callable[[int], tuple[list[Any], dict[str, Any]]]


@dataclasses.dataclass
class Row:
    """A model: how to make it, a call with a given batch, and the shapes to serve.

    `quick` rows are what is converted without `--all-models`. The results of `ranked` ones are in the order of scores,
    which roundings change, so that they are compared sorted.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    example: Example
    shapes: dict[str, Any] = dataclasses.field(default_factory=lambda: {"max_batch_size": 4})
    quick: bool = False
    ranked: bool = False


def parametrize(metafunc: pytest.Metafunc, rows: list[Row]) -> None:
    """To be called by a file's `pytest_generate_tests`: a test for each row."""
    if "row" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-models")
        metafunc.parametrize("row", [row for row in rows if row.quick or everything], ids=lambda row: row.name)


def images(*size: int) -> Example:
    return lambda batch: ([torch.randn(batch, *size)], {})


def check_row(row: Row, device: torch.device) -> None:
    torch.manual_seed(0)
    model = row.make().eval()
    awaken(model)
    settle(model, row.example)

    examples = [row.example(batch) for batch in (2, 1, 3)]
    with torch.no_grad():
        on_cpu = [tensors(model(*args, **kwargs)) for args, kwargs in examples] if device.type == "cuda" else []
    model = model.to(device)

    examples = [on(device, example) for example in examples]
    args, kwargs = examples[0]
    if device.type == "cuda":
        run = torch2rt(model, args, kwargs=kwargs, **row.shapes)
    else:
        run = ReferenceModule(lower(trace(model, args, kwargs=kwargs, **row.shapes)))
    largest = 0.0
    ordered = (lambda x: x.sort(-2).values) if row.ranked else lambda x: x
    for i, (args, kwargs) in enumerate(examples[1:], 1):
        with torch.no_grad():
            expected = tensors(model(*args, **kwargs))
        actual = tensors(run(*args, **kwargs))
        assert len(actual) == len(expected)
        for place, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            error, allowed = difference(ordered(ours), ordered(theirs)), 1e-3
            if on_cpu:  # its kernels round differently, layer upon layer; how much that matters, torch's own two tell
                on_other = on_cpu[i][place].to(device)
                allowed = max(5e-3, DEVICES_APART * difference(ordered(on_other), ordered(theirs)))
            largest = max(largest, error)
            assert error < allowed, f"output {place} is {error:.1e} off, more than {allowed:.1e}"
        if i == 2:
            assert spread(expected[0]) > 1e-3, "the model hardly looks at its input, so this would not see an error"
    print(f"{row.name}: largest relative error {largest:.1e}")


def awaken(model: torch.nn.Module) -> None:
    """Weights of which all matter: layer scales and zero heads hide what comes before them, and the small matrices that
    transformers start with make their attention see everything alike."""
    for parameter in filter(torch.numel, model.parameters()):
        if parameter.detach().abs().max() < 1e-4:
            torch.nn.init.normal_(parameter.data, 0.0, 0.2)
        elif parameter.dim() > 1 and parameter.shape[0] < 256 and parameter.detach().std() < 0.05:
            parameter.data.mul_(4)


def settle(model: torch.nn.Module, example: Example) -> None:
    """Statistics of the batch norms that keep activations in range."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    args, kwargs = example(4)
    with torch.no_grad():
        model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on(device, item) for key, item in value.items()}
    return type(value)(on(device, item) for item in value) if isinstance(value, (list, tuple)) else value


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a result, however nested."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for item in items for tensor in tensors(item)]


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; integers must be equal."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if not expected.is_floating_point() or not expected.numel():
        return float(not torch.equal(actual, expected))
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def spread(output: torch.Tensor) -> float:
    """How much the results for two inputs differ, relative to the largest value."""
    return ((output[0] - output[1]).abs().max() / output.abs().max()).item()
