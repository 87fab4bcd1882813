"""What one version of TensorRT gets wrong or does otherwise: a named question for each.

Every question states the versions, the symptom and the test that shows it, so that it can go when the version goes.
What a binding merely has or has not is asked of the binding itself, in `torch2rt.backend.tensorrt`.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from torch2rt.backend.tensorrt import FLAVOUR, IS_RTX, VERSION, is_listed, trt


def _release() -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(part) for part in VERSION.split(".")[:2])


# Attention -----------------------------------------------------------------------------------------------------------


def fuses_attention() -> bool:
    """Whether the layers that make up an attention run as one kernel, as the attention layer does, and no slower.

    TensorRT for RTX then also leaves out the copies around it, and what it makes of the layer's mask.
    """
    return IS_RTX


def prefers_attention_layer(dtype: torch.dtype, causal: bool) -> bool:
    """Whether an attention should be TensorRT's attention layer, where the layer takes its sizes.

    TensorRT for RTX 1.6 and 1.7 have no kernel for it in float32. They then take the layer apart, and fail to build it
    (`CHECK(i < op->input_size())`) where it is causal and another attention has the same inputs and is not.
    Test: `test_attention.py`, causal attention beside others, on a GPU.
    """
    return not fuses_attention() or causal and dtype is not torch.float32


# Numbers -------------------------------------------------------------------------------------------------------------


def relu_keeps_nan() -> bool:
    """Whether a RELU layer passes a NaN on: seen in TensorRT for RTX 1.6; of every other TensorRT nothing is known.

    Test: `test_special_values.py::test_special_values`, on a GPU.
    """
    return IS_RTX


def folds_or_without_broadcasting() -> bool:
    """Whether `OR(x, true)` becomes the constant in the constant's own shape: TensorRT for RTX 1.6 and 1.7.

    Bool constants are expanded before, with every TensorRT, as that costs nothing. Test: `test_comparison.py`.
    """
    return True


def folds_repeated_bools_wrong() -> bool:
    """Whether a slice that repeats a bool constant is folded into a wrong constant: TensorRT for RTX 1.6.

    Constants are expanded by torch before, with every TensorRT, as that costs nothing. Test: `test_shape.py`.
    """
    return True


def rounds_powers_wrong(dtype: torch.dtype) -> bool:
    """Whether a power in this dtype is not rounded to the nearest number.

    In bfloat16, TensorRT for RTX 1.6 takes 3.5 for 3.
    Test: `test_special_values.py`, on a GPU.
    """
    return dtype in (torch.float16, torch.bfloat16)


def computes_squares_wrong() -> bool:
    """Whether `(x @ x) * 2` is wrong: TensorRT for RTX 1.6, and others are not known to be right.

    A product of a tensor with itself, neither transposed, and a call element by element after it become one kernel of
    cuDNN's, which takes its operands for something else, or fails where a size is dynamic. So the second operand
    becomes another tensor. Test: `test_linear.py::test_products_of_a_tensor_with_itself`, on a GPU.
    """
    return IS_RTX


def computes_vectors_wrong(dtype: torch.dtype, dynamic: bool) -> bool:
    """Whether `(x @ y) * 2 + 1` is wrong where `x` has one row and there are several of both: TensorRT for RTX 1.6.

    Its kernel of such a product of a batch, and of calls element by element after it, gives 0 for all of the batch but
    the first. In float16 it is taken where the batch is dynamic, or the rows are and happen to be one; in float32 it
    was seen with static sizes only. Nothing wrong was seen of bfloat16. With a second row it is another kernel.
    Test: `test_linear.py::test_products_of_one_row`, on a GPU.
    """
    return IS_RTX and (not dynamic or dtype in (torch.float16, torch.bfloat16))


def drops_bias_before_products() -> bool:
    """Whether `relu(x @ w + b) * y` is computed without `b`, and with GELU in the place of ReLU: TensorRT for RTX 1.6.

    So are powers and norms, which end in a product. 1.7 makes the same kernels of it, `Fc` and `Mul`, and is not known
    to be right. It recognises a GELU that is written out, too. With something between bias and activation, a
    subtraction of 0, it does not. Test: `test_biases.py::test_biases_before_gates`, on a GPU and by the build's log.
    """
    return IS_RTX


def computes_in_tf32_unasked() -> bool:
    """Whether float32 products are computed in TF32 whatever the builder is told: TensorRT for RTX 1.4 to 1.7.

    Only the environment variable `NVIDIA_TF32_OVERRIDE=0` turns that off. Test: `test_module.py`, on a GPU.
    """
    return IS_RTX and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"


def computes_lone_products_low() -> bool:
    """Whether a product in float32 between casts from and to a narrow type is computed in the narrow type.

    TensorRT for RTX 1.6 does so with products of matrices, 1.7 with convolutions too: a weight of 1e6 is infinite in
    the plan. An addition in float32 before the cast back prevents it.
    Test: `test_mixed_precision.py`, by the build's log.
    """
    return IS_RTX


def builds_int8_convolutions() -> bool:
    """Whether a convolution of quantised values can be built: not by TensorRT for RTX before 1.7.

    1.4 and 1.6 have no kernel for it. Test: `test_quantize.py`, by the build's log.
    """
    return not IS_RTX or _release() >= (1, 7)


def lacks_dynamic_int4_in_float32() -> bool:
    """Whether float32 products of int4 weights may have no kernel where the number of rows is dynamic.

    TensorRT for RTX 1.6 builds them, and on an H200 some end at the first call in `cuDNN graph compilation failed: No
    valid engine configs for Matmul_`, with TF32 and without. With static sizes, in float16 and in bfloat16 all run. Of
    1.4 nothing is known. Such weights are brought back before the engine is built.
    Test: `test_formats.py`, and on a GPU `test_recognize.py`.
    """
    return IS_RTX and _release() < (1, 7)


def crashes_on_shared_weights() -> bool:
    """Whether the builder crashes where products in several places share one layer that brings int8 weights back.

    TensorRT for RTX 1.7 ends in a segmentation fault for a gated MLP of weights alone in int8 that is called twice. So
    each product has such a layer of its own, and each layer a constant of its own, as the builder unites equal layers.
    Test: `test_formats.py`, weights that are shared.
    """
    return True


def crashes_on_equal_weights() -> bool:
    """Whether the builder crashes on equal int8 weights in several places, whatever layers bring them back.

    TensorRT for RTX 1.6 does, for the same module as above; of earlier ones nothing is known. Such weights stay float.
    Test: `test_formats.py`, weights that are shared.
    """
    return IS_RTX and _release() < (1, 7)


def builds_refittable() -> bool:
    """Whether an engine can be built whose weights can be changed.

    TensorRT for RTX needs a GPU for that (seen in 1.6 and 1.7), and 1.6 fails in any case; 1.4 can, on a GPU.
    Test: `test_refit.py::test_weights_are_changed_in_place`, on a GPU.
    """
    if not IS_RTX:
        return True
    return torch.cuda.is_available() and _release() != (1, 6)


def builds_fp8_convolutions() -> bool:
    """Whether convolutions in fp8 are right and worth it: none is known to be.

    On an H200 those of TensorRT for RTX 1.4 give infinities, and those of 1.6 take longer than in float16.
    Test: none, as nothing builds them; `benchmarks/low_precision.py` measures them on a GPU.
    """
    return False


# Loops ---------------------------------------------------------------------------------------------------------------


def has_dynamic_while() -> bool:
    """Whether a loop with a condition may be part of an engine with dynamic shapes.

    In TensorRT for RTX 1.6, some such loops ran their body twice a turn, stopped early, or never ended.
    Test: `test_control_flow.py`, on a GPU.
    """
    return not IS_RTX


# Running -------------------------------------------------------------------------------------------------------------


def why_no_dynamic_shapes(capability: tuple[int, int]) -> str | None:
    """Why engines with dynamic shapes must not run on a GPU of this compute capability, if they must not.

    Without TF32, convolutions of TensorRT for RTX 1.4 with dynamic shapes give wrong results without an error on a GPU
    that it runs on but does not list (seen on 9.0). Static ones, those in TF32 and those of 1.6 are right.
    Test: `test_module.py::test_engines_that_would_compute_wrong_are_refused`.
    """
    old = IS_RTX and _release() < (1, 6)
    if old and not is_listed(capability) and os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return (
            f"{FLAVOUR} {VERSION} computes convolutions with dynamic shapes wrong on this GPU if NVIDIA_TF32_OVERRIDE=0"
            " is in the environment. Start Python without it, convert with static shapes, or install version 1.6."
        )
    return None


def runs_alone_at_other_shapes() -> bool:
    """Whether a run must be the engine's only one, if the context's last run had other shapes, or there was none.

    Contexts of one engine of TensorRT for RTX 1.6 share what cuDNN has planned for shapes. Where several run at other
    shapes at once, they end within seconds in `cuDNN graph execution error: No plan found to execute!` or in a
    segmentation fault; so they do if a context is made meanwhile. Runs at the same shapes as before may be at once. Of
    every other TensorRT nothing is known.
    Test: `test_runtime.py::test_many_threads_streams_and_shapes`, on a GPU.
    """
    return True


def create_execution_context(
    engine: Any, capability: tuple[int, int], kernels: Any = None, own_memory: bool = False
) -> Any:
    """An execution context of an engine on a GPU of this compute capability, with or without scratch memory.

    TensorRT for RTX compiles kernels for each shape it meets. On a GPU that it runs on but does not list, those of 1.6
    compute grouped convolutions wrong from the second shape on (seen on 9.0), so there only general kernels are used.
    `kernels` is an `IRuntimeCache` of what it has compiled before.
    """
    strategies = trt.ExecutionContextAllocationStrategy
    strategy = strategies.STATIC if own_memory else strategies.USER_MANAGED
    if not IS_RTX:
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    if kernels is not None:
        config.set_runtime_cache(kernels)
    if not is_listed(capability):
        specialization = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = specialization.NONE
    return engine.create_execution_context(config)
