"""Hold a converted model against its module: the differences of its outputs, and the latency of both."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from torch2rt.commands import Failure, Table, by, example

TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32_TOLERANCE = 1e-2


def verify(module: torch.nn.Module, model_trt: Any, device: torch.device, tolerance: float | None, show: Table) -> None:
    """Hold a converted model against its module at each of min, opt and max; raises `Failure`."""
    on_gpu = device.type == "cuda"
    run = model_trt if on_gpu else model_trt.reference()
    specs = model_trt.interface.inputs
    show.row(
        "verify",
        f"on {torch.cuda.get_device_name(device)}" if on_gpu else "by evaluating the network with torch, without a GPU",
    )
    failures = []
    dynamic = any(spec.dynamic for spec in specs)
    for which in ("min", "opt", "max") if dynamic else ("opt",):
        shapes = [getattr(spec, which) for spec in specs]
        inputs = [example(shape, spec.dtype, device) for shape, spec in zip(shapes, specs, strict=True)]
        with torch.no_grad():
            expected = module(*[x.clone() for x in inputs])
            actual = run(*inputs)
        where = f"at {which} {', '.join(map(by, shapes))}" if dynamic else f"at {', '.join(map(by, shapes))}"
        show.row("", where, *(_latency(module, model_trt, inputs) if on_gpu else ()))
        for name, difference in compare(model_trt.interface, actual, expected):
            allowed = tolerance if tolerance is not None else _allowed(difference.dtype, on_gpu and model_trt.network)
            show.row(
                f"  {name}", f"absolute error {difference.absolute:.1e}", f"relative error {difference.relative:.1e}"
            )
            if not difference.relative <= allowed:
                failures.append(f"{name} {where}: relative error {difference.relative:.1e}, allowed {allowed:.1e}")
    if failures:
        raise Failure("the converted model does not compute what the module does:\n  " + "\n  ".join(failures))


def _allowed(dtype: torch.dtype, network: Any) -> float:
    """The relative error to allow; `network` is the one that runs on a GPU, if one does."""
    from torch2rt.building import uses_tf32

    tf32 = network and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32 or uses_tf32(network))
    return TF32_TOLERANCE if tf32 and dtype is torch.float32 else TOLERANCES.get(dtype, 0.0)


class Difference:
    """The largest difference between two tensors, alone and relative to the largest expected value."""

    def __init__(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        self.dtype = expected.dtype
        a, b = (t.detach().double().flatten() for t in (actual, expected))
        same = (a == b) | (a.isnan() & b.isnan())
        errors = torch.where(same, 0.0, (a - b).abs()).nan_to_num(torch.inf, torch.inf)
        scale = torch.where(b.isfinite(), b.abs(), 0.0)
        self.absolute = errors.max().item() if errors.numel() else 0.0
        largest = scale.max().item() if scale.numel() else 0.0
        self.relative = self.absolute / largest if largest else self.absolute


def compare(interface: Any, actual: Any, expected: Any) -> list[tuple[str, Difference]]:
    """The difference of each output; raises `Failure` for values that are not built alike."""
    from torch2rt.structure import flatten

    (ours, our_spec), (theirs, their_spec) = (flatten(value, torch.is_tensor, "result") for value in (actual, expected))
    if our_spec != their_spec:
        raise Failure(f"the converted model returns {our_spec}, the module {their_spec}.")
    names = [interface.outputs[leaf["output"]] for leaf in interface.leaves if "output" in leaf]
    differences = {}
    for name, a, b in zip(names, ours, theirs, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise Failure(f"{name} is {a.dtype} {tuple(a.shape)}, the module gives {b.dtype} {tuple(b.shape)}.")
        differences[name] = Difference(a, b)
    return list(differences.items())


def _latency(module: torch.nn.Module, model_trt: Any, inputs: list[torch.Tensor], repeats: int = 50) -> tuple[str, str]:
    """Median milliseconds on the GPU of the engine and of the module."""
    medians = []
    for function in (model_trt, module):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        with torch.no_grad():
            for _ in range(10):
                function(*inputs)
            for start, end in events:
                start.record()
                function(*inputs)
                end.record()
        torch.cuda.synchronize()
        medians.append(statistics.median(start.elapsed_time(end) for start, end in events))
    return f"engine {medians[0]:.3f} ms", f"eager {medians[1]:.3f} ms"
