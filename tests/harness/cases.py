"""One way to test a converter: a row of a table, converted, built, run, and held against eager torch.

    from harness import B, S, case, check_case, ints, parametrize

    CASES = [case(F.leaky_relu, [(B, 3, 5)], 0.2)]

    @parametrize(CASES)
    def test_activation(row, mode, device):
        check_case(row, mode, device)

`B` and `S` are dynamic dimensions. Each row runs `static` (their `opt` size) and `dynamic` (one engine, three sizes).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from harness.reached import watching
from torch2rt import lower, torch2rt, trace
from torch2rt.backend.tensorrt import builds_without_gpu
from torch2rt.network import Network
from torch2rt.runtime.module import ReferenceModule, TRTModule
from torch2rt.structure import bare_name


@dataclasses.dataclass(frozen=True)
class Size:
    """A dimension that is dynamic in the dynamic run of a row."""

    name: str
    min: int
    opt: int
    max: int

    def __mul__(self, factor: int) -> Size:
        return Size(f"{factor}{self.name}", self.min * factor, self.opt * factor, self.max * factor)


# One kind of GPU where none is present, as building for each takes its time.
TARGET: dict[str, Any] = (
    {"compute_capabilities": ["8.9"]} if builds_without_gpu() and not torch.cuda.is_available() else {}
)
B = Size("B", 1, 2, 4)
S = Size("S", 4, 7, 12)


@dataclasses.dataclass(frozen=True)
class Data:
    """How to make one input: a shape of ints and `Size`s, a dtype, and a range of values."""

    shape: tuple[Any, ...]
    dtype: torch.dtype = torch.float32
    low: float | None = None
    high: float | None = None

    def at(self, which: str) -> tuple[int, ...]:
        return tuple(getattr(s, which) if isinstance(s, Size) else s for s in self.shape)

    def make(self, which: str) -> torch.Tensor:
        shape = self.at(which)
        if self.dtype is torch.bool:
            return torch.rand(shape) > 0.5
        if not self.dtype.is_floating_point:
            return torch.randint(
                -9 if self.low is None else int(self.low),
                10 if self.high is None else int(self.high),
                shape,
                dtype=self.dtype,
            )
        if self.low is None:
            return torch.randn(shape).to(self.dtype)
        assert self.high is not None
        return (torch.rand(shape) * (self.high - self.low) + self.low).to(self.dtype)


def ints(*shape: Any, low: int = -9, high: int = 10, dtype: torch.dtype = torch.int64) -> Data:
    """Random integers from `low` up to but not including `high`."""
    return Data(shape, dtype, low, high)


def bools(*shape: Any) -> Data:
    return Data(shape, torch.bool)


def floats(*shape: Any, low: float = 0.1, high: float = 2.0, dtype: torch.dtype = torch.float32) -> Data:
    """Random floats from `low` to `high`."""
    return Data(shape, dtype, low, high)


def half(*shape: Any) -> Data:
    return Data(shape, torch.float16)


@dataclasses.dataclass
class Case:
    """One row: `function(*inputs, *args, **kwargs)`; a module is called, a callable wrapped in one."""

    function: Callable[..., Any]
    inputs: list[Data]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    id: str
    rtol: float | None
    atol: float | None
    modes: tuple[str, ...]
    is_first: bool = True  # of the rows of one callable with the same dtypes
    is_new: bool = True  # the first of the rows of one callable


def case(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *args: Any,
    id: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    modes: tuple[str, ...] | None = None,
    **kwargs: Any,
) -> Case:
    """A row. `inputs` are shapes (float32) or `Data`; the rest is passed on. `modes` narrows how it runs."""
    data = [i if isinstance(i, Data) else Data(tuple(i)) for i in inputs]
    name = id or _name(function, data, args, kwargs)
    if modes is None:
        dynamic = any(isinstance(size, Size) for one in data for size in one.shape)
        modes = ("static", "dynamic") if dynamic else ("static",)
    return Case(function, data, args, kwargs, name, rtol, atol, modes)


def _name(function: Any, data: Any, args: Any, kwargs: Any) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    dtypes = ["" if d.dtype == torch.float32 else bare_name(d.dtype) for d in data]
    sizes = [",".join(getattr(s, "name", str(s)) for s in d.shape) for d in data]
    shapes = [f"{dtype}({size})" for dtype, size in zip(dtypes, sizes, strict=True)]
    return "-".join([name, *shapes, *map(str, args), *(f"{k}={v}" for k, v in kwargs.items())]).replace(" ", "")


def parametrize(cases: Sequence[Case]) -> Any:
    """Every row in each of its modes.

    Of the rows of one callable with the same dtypes, the first alone is built where there is no GPU: a build says no
    more there than that TensorRT takes the network, and takes longer than all the rest. Where there is none, the others
    have no run of their own with static sizes either, unless `--every-row` or the test's name asks for it.
    """
    kinds: set[Any] = set()
    rows = []
    for row in cases:
        function = callable_of(row.function)
        kind = (function, *(data.dtype for data in row.inputs))
        row = dataclasses.replace(row, is_first=kind not in kinds, is_new=function not in kinds)
        rows += [(row, mode) for mode in row.modes]
        kinds |= {kind, function}
    return pytest.mark.parametrize(("row", "mode"), rows, ids=[f"{row.id}-{mode}" for row, mode in rows])


def callable_of(function: Any) -> Any:
    """What is the same for two rows of one callable: torch's function, or the class of torch's module."""
    if isinstance(function, torch.nn.Module) and not isinstance(function, (With, torch.nn.Sequential)):
        return type(function)
    return function


class Call(torch.nn.Module):
    """A callable and its constant arguments as a module."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None):
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs or {}

    def forward(self, *input: Any) -> Any:
        return self.function(*input, *self.args, **self.kwargs)


class With(torch.nn.Module):
    """A module, and how it is called."""

    def __init__(self, module: torch.nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *input: Any) -> Any:
        return self.call(self.module, *input)


TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}


def prepared(row: Case, mode: str, device: torch.device) -> tuple[torch.nn.Module, list[torch.Tensor], dict[str, Any]]:
    """A row's module, an example of its inputs, and the ranges of their shapes, as `torch2rt` takes them."""
    args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device), (row.args, row.kwargs))
    module = row.function if isinstance(row.function, torch.nn.Module) else Call(row.function, args, kwargs)
    whiches = ("min", "opt", "max") if mode == "dynamic" else ()
    shapes = {f"{which}_shapes": [d.at(which) for d in row.inputs] for which in whiches}
    return module.eval().to(device), [d.make("opt").to(device) for d in row.inputs], shapes


def check_case(row: Case, mode: str, device: torch.device) -> Network:
    """Convert one row, run it at one size or at three, compare with eager; returns the network."""
    module, example, shapes = prepared(row, mode, device)
    run: torch.nn.Module
    # Torch remembers what calls on shapes give, which pays where a module repeats them.
    with watching(mode), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        if device.type == "cpu" and (not row.is_first or mode != row.modes[-1]):
            network = lower(trace(module, example, **shapes))
            run = ReferenceModule(network)
        else:
            verify = mode == "static"  # it is compared below in any case
            model_trt = torch2rt(module, example, verify=verify, **TARGET, **shapes)
            assert isinstance(model_trt, TRTModule)
            network, run = model_trt._networks[0], model_trt if device.type == "cuda" else model_trt.reference()
    for which in ("opt", "min", "max") if mode == "dynamic" else ("opt",):
        inputs = [d.make(which).to(device) for d in row.inputs]
        expected = eager(module, inputs)
        compare(run(*inputs), expected, row.rtol, row.atol)
    return network


def eager(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    """What torch computes; on the CPU where its CUDA kernels do not know a dtype (integer matrix products)."""
    with torch.no_grad():
        try:
            return module(*[i.clone() for i in inputs])
        except NotImplementedError:
            device = inputs[0].device
            result = copy.deepcopy(module).cpu()(*[i.cpu() for i in inputs])
            return tree_map_only(torch.Tensor, lambda t: t.to(device), result)


def compare(actual: Any, expected: Any, rtol: float | None = None, atol: float | None = None) -> None:
    """Structure, then shape and dtype, then values."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), f"{type(actual)} for a tensor"
        assert actual.shape == expected.shape, f"{actual.shape} for {expected.shape}"
        assert actual.dtype == expected.dtype, f"{actual.dtype} for {expected.dtype}"
        default = TOLERANCES.get(expected.dtype, (0.0, 0.0))
        torch.testing.assert_close(
            actual,
            expected,
            rtol=default[0] if rtol is None else rtol,
            atol=default[1] if atol is None else atol,
            equal_nan=True,
            check_stride=False,
        )
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            compare(actual[key], expected[key], rtol, atol)
    elif isinstance(expected, (tuple, list)):
        assert type(actual) is type(expected) or isinstance(expected, tuple) and isinstance(actual, tuple)
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            compare(ours, theirs, rtol, atol)
    else:
        assert actual == expected
