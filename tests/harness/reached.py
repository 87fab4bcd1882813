"""Which converters the rows of the tables reach: a run of all of them ends with an error if one is reached by none."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torchvision.ops  # noqa: F401  # the converters of its operators are registered when it is there

from torch2rt.callables import qualified_name
from torch2rt.registry import Converter, load

REGISTRY = load()
REACHED: set[tuple[str, str]] = set()  # mode and place, of this process


def served() -> dict[Callable[..., Any], list[Any]]:
    """The callables that each converter and each composite of torch2rt's own serves; other tests register some, too."""
    functions: dict[Callable[..., Any], list[Any]] = {}
    for table in (REGISTRY.converters, REGISTRY.on_complex):
        for target, entry in table.items():
            functions.setdefault(entry.function, []).append(target)
    for target, body in REGISTRY.composites.items():
        functions.setdefault(inspect.unwrap(body), []).append(target)
    return {f: targets for f, targets in functions.items() if f.__module__.startswith("torch2rt.converters.")}


SERVED = served()


@functools.cache
def label(function: Callable[..., Any]) -> str:
    """The family of a converter, and the first name it serves."""
    return f"{function.__module__.rpartition('.')[2]} {qualified_name(SERVED[function][0])}"


# Called by no row of the family's own tables, and why.
ALIASED = "torch returns its argument, so that nothing is left to convert"
ON_A_GPU = "it runs on a GPU alone"
FOR_GRADIENTS = "its results that are for gradients are refused"
CHECKS = "it checks an argument and steps aside"
ELSEWHERE = {
    "elementary torch.positive": ALIASED,
    "dropout torch.dropout": ALIASED,
    "dropout torch.nn.functional.alpha_dropout": ALIASED,
    "attention torch.nn.functional.multi_head_attention_forward": CHECKS,
    "embedding torch.nn.functional.embedding": CHECKS,
    "joining torch.tensor_split": CHECKS,
    "shape torch.as_strided": CHECKS,
    "attention torch.ops.aten._scaled_dot_product_flash_attention": FOR_GRADIENTS,
    "attention torch.ops.aten._scaled_dot_product_cudnn_attention": ON_A_GPU,
    "attention torch.ops.aten._scaled_dot_product_efficient_attention": ON_A_GPU,
    "attention torch.ops.aten._scaled_dot_product_fused_attention_overrideable": ON_A_GPU,
    "embedding torch._embedding_bag": FOR_GRADIENTS,
    "linalg torch.ops.aten._linalg_det": FOR_GRADIENTS,
    "normalization torch.ops.aten._batch_norm_with_update": "it only refuses",
    "normalization torch.cudnn_batch_norm": ON_A_GPU,
    "normalization torch.batch_norm": "in training it is state, which test_stateful.py has",
    "recurrence torch._cudnn_rnn": ON_A_GPU,
    "recurrence torch.ops.aten._thnn_fused_gru_cell": "only a GPU has kernels; it has a test of its own",
    "recurrence torch.ops.aten._thnn_fused_lstm_cell": "only a GPU has kernels; it has a test of its own",
    "kernels torch.ops.aten.convolution_overrideable": "no device of ours has a kernel for it",
    "kernels torch.ops.aten.cudnn_convolution_relu": ON_A_GPU,
    "kernels torch.ops.aten.cudnn_convolution_add_relu": ON_A_GPU,
    "kernels torch.ops.aten.mkldnn_linear": "its tensors have a memory layout of their own",
    "vision torch.ops.torchvision.nms": "it only refuses",
    "vision torch.ops.torchvision.box_iou_rotated": "it only refuses",
    "quantization torch2rt.passes.quantization.quantized.dequantize": "passes make its calls, of constants",
    "attention torch2rt.passes.quantization.quantized.attention_of_quantized": "passes make its calls",
    "quantization torch2rt.passes.quantization.quantized.fake_quantize_fp8": "passes make its calls: test_formats.py",
    "quantization torch.fused_moving_avg_obs_fake_quant": "torch.ao makes its calls: test_torch_quantized.py",
    "quantization torch.ops.aten._scaled_mm": "torchao makes its calls: test_float8.py",
    "resize torch._C._nn._upsample_lanczos2d_aa": "it came with torch 2.15, and has a test of its own",
    "complex torch.scalar_tensor": "it is folded",
}
# Called for static sizes only, and why.
STATIC = {
    "integers torch.gcd": "how often its loop runs depends on data, which is refused for dynamic shapes",
    "integers torch.lcm": "like gcd",
    "pooling torch._C._nn.adaptive_max_pool2d": "indices need static sizes",
    "scatter torch.masked_select": "a constant mask has a size of its own",
}


@functools.cache
def place(function: Callable[..., Any]) -> str:
    """Where a converter is written, the same in every process."""
    code = function.__code__
    return f"{function.__module__}:{code.co_firstlineno}:{'.'.join(sorted(map(qualified_name, SERVED[function])))}"


@contextlib.contextmanager
def watching(mode: str) -> Iterator[None]:
    """Note which converters are called meanwhile, and which composites do not step aside."""
    bind, composites = Converter.bind, REGISTRY.composites

    def noted(self: Converter, *args: Any) -> Any:
        note(self.function)
        return bind(self, *args)

    def note(function: Callable[..., Any]) -> None:
        if function in SERVED:
            REACHED.add((mode, place(function)))

    def noting(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def call(*args: Any, **kwargs: Any) -> Any:
            out = body(*args, **kwargs)
            if out is not NotImplemented:
                note(inspect.unwrap(body))
            return out

        return call

    Converter.bind = noted  # type: ignore[method-assign,assignment]
    REGISTRY.composites = {target: noting(body) for target, body in composites.items()}
    try:
        yield
    finally:
        Converter.bind, REGISTRY.composites = bind, composites  # type: ignore[method-assign]


def missing(called: Collection[tuple[str, str]]) -> list[str]:
    """The converters that no row reaches, and those that no row with dynamic sizes reaches."""
    names = []
    for function in SERVED:
        name, modes = label(function), {mode for mode, other in called if other == place(function)}
        # test_recognize.py has the decomposed ones, and test_torch_quantized.py those of torch.ao
        if function.__module__.endswith((".decomposed", ".modelopt", ".torch_quantized")) or name in ELSEWHERE:
            continue
        if not modes:
            names.append(name)
        elif "dynamic" not in modes and name not in STATIC:
            names.append(f"{name}, for dynamic sizes")
    return sorted(names)
