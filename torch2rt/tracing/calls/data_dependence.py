"""Calls that need the values of traced tensors, which a trace does not have: errors at the user's line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from torch2rt.callables import Target, qualified_name
from torch2rt.errors import TraceError
from torch2rt.tracing.recorder import Recorder

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
READS = frozenset(
    """
        __bool__ __int__ __float__ __index__ item __contains__ equal allclose is_nonzero _assert _assert_async
    """.split()
)
LEAVES_TORCH = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage"})
_NEED_VALUES = READS | LEAVES_TORCH
_OF_QUANTISED = {"aten.dequantize.self", "aten.quantize_per_tensor.default", "aten.quantize_per_channel.default"}


class UnknownResultError(TraceError):
    """What a call returns, torch can only say after running it on values."""


def reads_values(func: Target) -> bool:
    """Whether a call gives tensors' values to Python or to another library."""
    return getattr(func, "__name__", "") in _NEED_VALUES


def guarded(recorder: Recorder, func: Target, call: Callable[[], Any]) -> Any:
    """Run a traced call; what cannot be known without real data is an error at the user's line."""
    try:
        return call()
    except DATA_DEPENDENT as error:
        raise UnknownResultError(_depends_on_data(recorder, func)) from error
    except UnsupportedOperatorException as error:
        why = f"{error.func} has no fake implementation"
        if str(error.func) in _OF_QUANTISED or str(error.func).startswith(("quantized.", "aten.quantized_")):
            why = (
                f"{error.func} is of torch's quantised tensors, which are the CPU's own. Convert the module before its "
                "convert(), with its fake quantisation, or as torch.export and pt2e quantise it, or in floating point "
                "with precision='int8'"
            )
        raise UnknownResultError(
            f"{recorder.location.here()}: torch itself cannot tell the shape of what {qualified_name(func)} returns "
            f"without running it ({why})."
        ) from error
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if "no fake impl" in str(error):  # of a custom operator
            raise UnknownResultError(
                f"{recorder.location.here()}: torch itself cannot tell the shape of what {qualified_name(func)} "
                "returns without running it, as no fake implementation was registered."
            ) from error
        if isinstance(error, TypeError) and "FakeTensor" in str(error):  # a tensor in the place of a number
            raise UnknownResultError(_depends_on_data(recorder, func)) from error
        if getattr(func, "__name__", "") in LEAVES_TORCH:
            raise UnknownResultError(
                f"{recorder.location.here()}: {qualified_name(func)} takes a traced tensor out of torch, so what "
                "follows cannot be recorded. Keep the computation in torch, or make it an operator "
                "(torch.library.custom_op), which fallback=True runs between engines."
            ) from error
        raise


def _depends_on_data(recorder: Recorder, func: Target) -> str:
    name, here = qualified_name(func), recorder.location.here()
    other = " Or give the submodule or function that it is in to torch2rt.graph_break." if recorder.fallback else ""
    if getattr(func, "__name__", "").split(".")[0] in READS:
        return (
            f"{here}: the module's Python depends on the value of a tensor ({name}), which a fixed graph cannot. "
            f"Compute both sides and choose with torch.where, or move the decision out of the module.{other}"
        )
    advice = recorder.registry.advice(func) or "Where its use allows it, keep all elements and mask instead."
    return f"{here}: the shape of {name}'s result depends on the values of its tensors. {advice.rstrip('.')}.{other}"
