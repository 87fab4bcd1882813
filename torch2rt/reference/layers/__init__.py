"""What each TensorRT layer computes, in torch: `LAYERS` has one function per layer type.

Such a function reads the layer's attributes once and returns what turns the layer's inputs (None where an optional
one is missing) into its outputs. All of it is written from TensorRT's documentation and from what its shape inference
folds, never from our converters. The documentation is silent about NaN: there, bounds, maxima, minima, poolings and
orders pass over a NaN, as some kernels of TensorRT for RTX 1.6 do. Half precision is computed in float32 and rounded
once, at the end, as kernels do.

One family of layers a file: `LAYERS` says which file a layer's function is in, and `common` holds what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch2rt.reference.layers import (
    attention,
    convolution,
    creation,
    indexing,
    nms,
    normalization,
    pointwise,
    pooling,
    products,
    quantization,
    reduction,
    resize,
    shapes,
)
from torch2rt.reference.layers.common import Run, Stored, dims, require, torch_type

__all__ = ["LAYERS", "dims", "require", "torch_type"]

LAYERS: dict[str, tuple[str, Callable[[Any, Stored], Run]]] = {
    "ACTIVATION": ("IActivationLayer", pointwise.activation),
    "ATTENTION_INPUT": ("IAttentionInputLayer", attention.attention),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", pointwise.identity),
    "CAST": ("ICastLayer", pointwise.cast),
    "CONCATENATION": ("IConcatenationLayer", shapes.concatenation),
    "CONDITIONAL_INPUT": ("IIfConditionalInputLayer", pointwise.identity),
    "CONSTANT": ("IConstantLayer", creation.constant),
    "CONVOLUTION": ("IConvolutionLayer", convolution.convolution),
    "CUMULATIVE": ("ICumulativeLayer", reduction.cumulative),
    "DECONVOLUTION": ("IDeconvolutionLayer", convolution.deconvolution),
    "DEQUANTIZE": ("IDequantizeLayer", quantization.dequantize),
    "EINSUM": ("IEinsumLayer", products.einsum),
    "ELEMENTWISE": ("IElementWiseLayer", pointwise.elementwise),
    "FILL": ("IFillLayer", creation.fill),
    "GATHER": ("IGatherLayer", indexing.gather),
    "GRID_SAMPLE": ("IGridSampleLayer", resize.grid_sample),
    "IDENTITY": ("IIdentityLayer", pointwise.identity),
    "LRN": ("ILRNLayer", normalization.lrn),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", products.matrix_multiply),
    "NMS": ("INMSLayer", nms.nms),
    "NON_ZERO": ("INonZeroLayer", indexing.non_zero),
    "NORMALIZATION": ("INormalizationLayer", normalization.normalization),
    "ONE_HOT": ("IOneHotLayer", indexing.one_hot),
    "PADDING": ("IPaddingLayer", shapes.padding),
    "PARAMETRIC_RELU": ("IParametricReLULayer", pointwise.parametric_relu),
    "POOLING": ("IPoolingLayer", pooling.pooling),
    "QUANTIZE": ("IQuantizeLayer", quantization.quantize),
    "RAGGED_SOFTMAX": ("IRaggedSoftMaxLayer", normalization.ragged_softmax),
    "REDUCE": ("IReduceLayer", reduction.reduce),
    "RESIZE": ("IResizeLayer", resize.resize),
    "REVERSE_SEQUENCE": ("IReverseSequenceLayer", indexing.reverse_sequence),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", attention.rotary_embedding),
    "SCALE": ("IScaleLayer", pointwise.scale),
    "SCATTER": ("IScatterLayer", indexing.scatter),
    "SELECT": ("ISelectLayer", pointwise.select),
    "SHAPE": ("IShapeLayer", shapes.shape_of),
    "SHUFFLE": ("IShuffleLayer", shapes.shuffle),
    "SLICE": ("ISliceLayer", shapes.slice_),
    "SOFTMAX": ("ISoftMaxLayer", normalization.softmax),
    "SQUEEZE": ("ISqueezeLayer", shapes.squeeze),
    "TOPK": ("ITopKLayer", reduction.topk),
    "UNARY": ("IUnaryLayer", pointwise.unary),
    "UNSQUEEZE": ("IUnsqueezeLayer", shapes.unsqueeze),
}
