"""What converters are written in, and all that they import of torch2rt.

A *value* is a TensorRT tensor, a torch tensor (a weight), a number or a symbolic size; every verb takes any of them.
Types, broadcasting and dynamic sizes are handled inside. Sizes are ints, or `SymInt`s where dynamic, and plain Python
arithmetic works on both. Complex values are pairs of parts, whose arithmetic is in `torch2rt.vocabulary.complex`.
"""

import torch

from torch2rt.backend.quirks import fuses_attention, has_dynamic_while, prefers_attention_layer, rounds_powers_wrong
from torch2rt.backend.tensorrt import (
    add_attention,
    add_normalization,
    has_attention,
    has_cumulative,
    scales_groups_by_channel,
    trt,
)
from torch2rt.callables import named
from torch2rt.passes.quantization.quantized import dequantize, fake_quantize, fake_quantize_fp8, scaled
from torch2rt.registry import by_schema, complex_converter, composite, converter, factory, fusion, keep, rewrite
from torch2rt.sizes import answer, expression, is_symbolic
from torch2rt.tracing.computed_masks import COUNTED, MaskIndices, Selection, assign
from torch2rt.tracing.subgraphs import run, scope, subgraph
from torch2rt.vocabulary.context import Complex, Context
from torch2rt.vocabulary.layers import constant, dequantized, quantized_and_back, stored
from torch2rt.vocabulary.movement import concat, expand, gather, iota, lift, narrow, permute, slice_nd, unlift
from torch2rt.vocabulary.plain import (
    axes,
    check,
    dims,
    dtype_of,
    is_integral,
    is_traced,
    largest,
    ntuple,
    proven,
    refuse,
    require,
    same_size,
    wide,
    wrap_dim,
)
from torch2rt.vocabulary.pointwise import (
    activation,
    add,
    clamp,
    div,
    elementwise,
    equal,
    floor_div,
    greater,
    is_negative,
    less,
    logical_and,
    logical_or,
    logical_xor,
    maximum,
    minimum,
    mul,
    select,
    sub,
    unary,
)
from torch2rt.vocabulary.products import matmul
from torch2rt.vocabulary.reduction import reduce, weighted_gather
from torch2rt.vocabulary.shapes import shape_tensor
from torch2rt.vocabulary.tensors import broadcast, cast, materialize, operands, reshape, result_type

__all__ = [
    "COUNTED",
    "Complex",
    "Context",
    "MaskIndices",
    "Selection",
    "activation",
    "add",
    "add_attention",
    "add_normalization",
    "answer",
    "assign",
    "axes",
    "broadcast",
    "by_schema",
    "cast",
    "check",
    "clamp",
    "complex_converter",
    "composite",
    "concat",
    "constant",
    "converter",
    "dequantize",
    "dequantized",
    "dims",
    "div",
    "dtype_of",
    "elementwise",
    "equal",
    "expand",
    "expression",
    "factory",
    "fake_quantize",
    "fake_quantize_fp8",
    "floor_div",
    "fuses_attention",
    "fusion",
    "gather",
    "greater",
    "has_attention",
    "has_cumulative",
    "has_dynamic_while",
    "iota",
    "is_integral",
    "is_negative",
    "is_symbolic",
    "is_traced",
    "keep",
    "largest",
    "less",
    "lift",
    "logical_and",
    "logical_or",
    "logical_xor",
    "materialize",
    "matmul",
    "maximum",
    "minimum",
    "mul",
    "named",
    "narrow",
    "ntuple",
    "operands",
    "permute",
    "prefers_attention_layer",
    "proven",
    "quantized_and_back",
    "reduce",
    "refuse",
    "require",
    "reshape",
    "result_type",
    "rewrite",
    "rounds_powers_wrong",
    "run",
    "same_size",
    "scaled",
    "scales_groups_by_channel",
    "scope",
    "select",
    "shape_tensor",
    "slice_nd",
    "stored",
    "sub",
    "subgraph",
    "torch",
    "trt",
    "unary",
    "unlift",
    "weighted_gather",
    "wide",
    "wrap_dim",
]
