"""The reference against torch, plain loops and numbers worked out by hand; with `--device cuda` engines as well."""

import gc
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch2rt import lower, trace
from torch2rt.backend.tensorrt import DTYPES, LOG, create_builder, create_network, trt
from torch2rt.errors import InputError, Torch2RTError
from torch2rt.reference.evaluator import Evaluator, evaluate
from torch2rt.runtime.module import ReferenceModule

HALF, BF16 = torch.float16, torch.bfloat16
Activation, Unary, Op, Reduce = trt.ActivationType, trt.UnaryOperation, trt.ElementWiseOperation, trt.ReduceOperation
Mode, Transform, Sample = trt.InterpolationMode, trt.ResizeCoordinateTransformation, trt.SampleMode
Pad, Pool, Round = trt.PaddingMode, trt.PoolingType, trt.ResizeRoundMode
Gather, Scatter = trt.GatherMode, trt.ScatterMode
Matrix, Fill, Scale, Output, Trip = trt.MatrixOperation, trt.FillOperation, trt.ScaleMode, trt.LoopOutput, trt.TripLimit
CASES = []


class Net:
    """A network under construction, with the inputs to feed and the weights that cannot be read back."""

    def __init__(self):
        self.builder = create_builder()
        self.trt = create_network(self.builder)
        self.feeds, self.stored = {}, {}

    def input(self, value, dynamic=False):
        name = f"x{len(self.feeds)}"
        self.feeds[name] = value
        shape = (-1,) * value.ndim if dynamic else tuple(value.shape)
        return self.trt.add_input(name, DTYPES[value.dtype], shape)

    def constant(self, value, dtype=None):
        value = torch.as_tensor(value, dtype=dtype).contiguous()
        if value.numel() == 0:
            return self.trt.add_constant(tuple(value.shape), trt.Weights(DTYPES[value.dtype])).get_output(0)
        self.stored[self.trt.num_layers, "weights"] = value
        weights = trt.Weights(DTYPES[value.dtype], value.data_ptr(), value.numel())
        return self.trt.add_constant(tuple(value.shape), weights).get_output(0)

    def ints(self, *values):
        return self.constant(list(values), torch.int64)

    def op(self, a, b, op):
        return self.trt.add_elementwise(a, b, op).get_output(0)

    def evaluate(self, *made, device="cpu", stored=True):
        for layer in made:
            self.trt.mark_output(tensor(layer))
        feeds = {name: value.to(device) for name, value in self.feeds.items()}
        outputs = evaluate(self.trt, feeds, self.stored if stored else {})
        return [outputs[tensor(layer).name].cpu() for layer in made]


def tensor(made):
    return made if isinstance(made, trt.ITensor) else made.get_output(0)


def tuples(value):
    return value if isinstance(value, tuple) else (value,)


def rows(*arguments):
    """Register a function of a `Net` that returns layers (or tensors) and what they should compute; once per row."""

    def register(function):
        for row in arguments or [()]:
            words = [function.__name__, *(getattr(a, "name", getattr(a, "__name__", a)) for a in tuples(row))]
            CASES.append(pytest.param(function, tuples(row), id="-".join(map(str, words)).replace(" ", "")))
        return function

    return register


def setting(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def data(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(*shape, low=-9, high=10, dtype=torch.int64, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numpy_weights(value):
    return np.ascontiguousarray(value.numpy())


def same(made, expected, loosely=False):
    expected = torch.as_tensor(expected)
    tolerance = {HALF: 2e-3, BF16: 2e-2, torch.float32: 2e-5}.get(expected.dtype, 0) * (10 if loosely else 1)
    torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


# ---- elementwise


@rows(
    (Activation.RELU, None, None, F.relu),
    (Activation.SIGMOID, None, None, lambda x: 1 / (1 + torch.exp(-x))),
    (Activation.TANH, None, None, lambda x: 1 - 2 / (torch.exp(2 * x) + 1)),
    (Activation.LEAKY_RELU, 0.2, None, lambda x: F.leaky_relu(x, 0.2)),
    (Activation.ELU, 1.3, None, lambda x: F.elu(x, 1.3)),
    (Activation.SELU, None, None, F.selu),
    (Activation.SELU, 0.5, 2.0, lambda x: 2 * F.elu(x, 0.5)),
    (Activation.SOFTSIGN, None, None, F.softsign),
    (Activation.SOFTPLUS, 2.0, 3.0, lambda x: 2 * torch.log(torch.exp(3 * x) + 1)),
    (Activation.CLIP, -0.5, 0.25, lambda x: F.hardtanh(x, -0.5, 0.25)),
    (Activation.HARD_SIGMOID, 0.3, 0.4, lambda x: torch.clamp(0.3 * x + 0.4, 0, 1)),
    (Activation.SCALED_TANH, 1.7, 0.6, lambda x: 1.7 * torch.tanh(0.6 * x)),
    (Activation.THRESHOLDED_RELU, 0.3, None, lambda x: F.threshold(x, 0.3, 0)),
    (Activation.GELU_ERF, None, None, F.gelu),
    (Activation.GELU_TANH, None, None, lambda x: F.gelu(x, approximate="tanh")),
)
def activation(n, kind, alpha, beta, expected):
    x = 2 * data(3, 5, 7)
    given = {k: v for k, v in (("alpha", alpha), ("beta", beta)) if v is not None}
    layer = setting(n.trt.add_activation(n.input(x), kind), **given)
    short = setting(n.trt.add_activation(n.input(x.half()), kind), **given)
    return (layer, short), (expected(x), expected(x.half().float()).half())


@rows()
def activation_integer(n):
    return n.trt.add_activation(n.input(torch.tensor([-3, 0, 5])), Activation.RELU), [0, 0, 5]


@rows()
def nans_are_passed_over(n):
    """As some kernels do, so that a converter which relies on such a layer is seen to lose a NaN."""
    nan = math.nan
    x = torch.tensor([[[[nan, 1.0, -7.0, nan]]]])
    y = torch.tensor([[[[2.0, nan, nan, nan]]]])
    a, b = n.input(x), n.input(y)
    made = {
        setting(n.trt.add_activation(a, Activation.CLIP), alpha=-0.5, beta=0.25): [-0.5, 0.25, -0.5, -0.5],
        setting(n.trt.add_activation(a, Activation.HARD_SIGMOID), alpha=0.5, beta=0.0): [1.0, 0.5, 0.0, 1.0],
        n.op(a, b, Op.MAX): [2.0, 1.0, -7.0, nan],
        n.op(a, b, Op.MIN): [2.0, 1.0, -7.0, nan],
        n.trt.add_reduce(a, Reduce.MAX, 8, False): [1.0],
        n.trt.add_reduce(a, Reduce.MIN, 8, False): [-7.0],
        setting(n.trt.add_pooling_nd(a, Pool.MAX, (1, 2)), stride_nd=(1, 2)): [1.0, -7.0],
        n.trt.add_topk(a, trt.TopKOperation.MAX, 3, 8): [1.0, -7.0, -math.inf],
        n.trt.add_unary(a, Unary.SIGN): [nan, 1.0, -1.0, nan],
    }
    shapes = [tuple(tensor(layer).shape) for layer in made]
    return tuple(made), tuple(torch.tensor(v).reshape(s) for v, s in zip(made.values(), shapes, strict=True))


INSIDE, ANY = torch.linspace(0.1, 0.9, 7), torch.linspace(-3.4, 3.1, 9)


@rows(
    (Unary.EXP, ANY, np.exp),
    (Unary.LOG, INSIDE, np.log),
    (Unary.SQRT, INSIDE, np.sqrt),
    (Unary.RECIP, ANY, np.reciprocal),
    (Unary.ABS, ANY, np.abs),
    (Unary.NEG, ANY, np.negative),
    (Unary.SIN, ANY, np.sin),
    (Unary.COS, ANY, np.cos),
    (Unary.TAN, ANY, np.tan),
    (Unary.SINH, ANY, np.sinh),
    (Unary.COSH, ANY, np.cosh),
    (Unary.ASIN, INSIDE, np.arcsin),
    (Unary.ACOS, INSIDE, np.arccos),
    (Unary.ATAN, ANY, np.arctan),
    (Unary.ASINH, ANY, np.arcsinh),
    (Unary.ACOSH, INSIDE + 1, np.arccosh),
    (Unary.ATANH, INSIDE, np.arctanh),
    (Unary.CEIL, ANY, np.ceil),
    (Unary.FLOOR, ANY, np.floor),
    (Unary.SIGN, ANY, np.sign),
    (Unary.ERF, ANY, np.vectorize(math.erf, otypes=[np.float32])),
)
def unary(n, op, x, expected):
    return n.trt.add_unary(n.input(x), op), torch.from_numpy(expected(x.numpy()))


@rows()
def unary_others(n):
    x = torch.tensor([0.5, 1.5, -2.5, -math.inf, math.nan, 0])
    ops = [n.trt.add_unary(n.input(x), op) for op in (Unary.ROUND, Unary.ISINF, Unary.ISNAN)]
    flags, numbers = torch.tensor([True, False]), torch.tensor([-4, 0, 9], dtype=torch.int32)
    ops += [n.trt.add_unary(n.input(flags), Unary.NOT)]
    ops += [n.trt.add_unary(n.input(numbers), op) for op in (Unary.ABS, Unary.NEG, Unary.SIGN)]
    rounded = torch.tensor([0.0, 2.0, -2.0, -math.inf, math.nan, 0])
    infinite, missing = [False, False, False, True, False, False], [False, False, False, False, True, False]
    integers = [torch.tensor(v, dtype=torch.int32) for v in ([4, 0, 9], [4, 0, -9], [-1, 0, 1])]
    return tuple(ops), (rounded, infinite, missing, [False, True], *integers)


@rows(
    (Op.SUM, np.add),
    (Op.PROD, np.multiply),
    (Op.MAX, np.maximum),
    (Op.MIN, np.minimum),
    (Op.SUB, np.subtract),
    (Op.DIV, np.divide),
    (Op.POW, np.power),
    (Op.EQUAL, np.equal),
    (Op.GREATER, np.greater),
    (Op.LESS, np.less),
)
def elementwise(n, op, expected):
    a, b = data(2, 1, 3).abs() + 0.5, data(1, 4, 3, seed=1)
    b[0, 1] = a[1, 0]
    short = op not in (Op.EQUAL, Op.GREATER, Op.LESS)
    ha, hb = a.half(), b.half()
    made = n.op(n.input(a), n.input(b), op), n.op(n.input(ha), n.input(hb), op)
    half = torch.from_numpy(expected(ha.float().numpy(), hb.float().numpy()))
    return made, (torch.from_numpy(expected(a.numpy(), b.numpy())), half.half() if short else half)


@rows(
    (Op.DIV, [7, -7, 7, -7], [2, 2, -2, -2], [3, -3, -3, 3]),
    (Op.FLOOR_DIV, [7, -7, 7, -7], [2, 2, -2, -2], [3, -4, -4, 3]),
    (Op.POW, [1, -1, 2, -2, 3], [-1, -1, -1, 3, 0], [1, -1, 0, -8, 1]),
    (Op.SUM, [2**62, 1], [2**62, -3], [-(2**63), -2]),
    (Op.MAX, [3, -5], [2, -4], [3, -4]),
    (Op.EQUAL, [3, -5], [3, 5], [True, False]),
    (Op.LESS, [3, -5], [3, 5], [False, True]),
    (Op.FLOOR_DIV, [7.5, -7.5, 1.0], [2.0, 2.0, 0.1], [3.0, -4.0, 10.0]),
    (Op.FLOOR_DIV, [2**60 + 1], [-1], [-(2**60) - 1]),
    (Op.AND, [True, True, False], [True, False, False], [True, False, False]),
    (Op.OR, [True, True, False], [True, False, False], [True, True, False]),
    (Op.XOR, [True, True, False], [True, False, False], [False, True, False]),
    (Op.EQUAL, [True, False], [True, True], [True, False]),
)
def arithmetic(n, op, a, b, expected):
    return n.op(n.input(torch.tensor(a)), n.input(torch.tensor(b)), op), expected


@rows()
def select(n):
    c, a, b = torch.tensor([[True], [False]]), whole(1, 3), whole(2, 3, seed=1)
    return n.trt.add_select(n.input(c), n.input(a), n.input(b)), [a[0].tolist(), b[1].tolist()]


@rows()
def parametric_relu(n):
    x, slopes = data(2, 3, 4), data(3).abs()
    return n.trt.add_parametric_relu(n.input(x), n.input(slopes.reshape(1, 3, 1))), F.prelu(x, slopes)


@rows(
    (Scale.UNIFORM, None, (1,), (2, 3, 4, 5)),
    (Scale.CHANNEL, None, (3, 1, 1), (2, 3, 4, 5)),
    (Scale.CHANNEL, 2, (4, 1), (2, 3, 4, 5)),
    (Scale.ELEMENTWISE, 1, (3, 4, 5), (2, 3, 4, 5)),
)
def scale(n, mode, axis, weights, shape):
    x = data(*shape).abs() + 1
    parts = [data(*weights, seed=i).abs() + 0.1 for i in range(3)]
    shift, factor, power = map(numpy_weights, parts)
    full = (x * parts[1] + parts[0]) ** parts[2]
    if axis is not None:
        return n.trt.add_scale_nd(n.input(x), mode, shift, factor, power, axis), full
    some = n.trt.add_scale(n.input(x), mode, shift), n.trt.add_scale(n.input(x), mode, scale=factor)
    return (n.trt.add_scale(n.input(x), mode, shift, factor, power), *some), (full, x + parts[0], x * parts[1])


# ---- constants and types


@rows()
def constants(n):
    kept = [data(2, 3), torch.tensor(4.5), whole(3), torch.tensor([[True, False]]), data(2, dtype=HALF)]
    made = [n.trt.add_constant(tuple(v.shape), trt.Weights(v.reshape(-1).numpy())) for v in kept]
    return (*made, n.constant(data(3, dtype=BF16))), (*kept, data(3, dtype=BF16))


@rows()
def empty_constant(n):
    return n.trt.add_concatenation([n.constant(torch.empty(0, 3)), n.input(data(2, 3))]), data(2, 3)


@rows(
    ([1.9, -1.9, 2.5, -0.5], torch.int64, [1, -1, 2, 0]),
    ([0.0, -0.3, 2.0], torch.bool, [False, True, True]),
    ([2**33 + 5, -1], torch.int32, [5, -1]),
    ([2049.0, 70000.0], HALF, [2048.0, math.inf]),
    ([True, False], BF16, [1.0, 0.0]),
    ([3, -4], torch.float32, [3.0, -4.0]),
    ([300, 2], torch.uint8, [44, 2]),
)
def cast(n, values, dtype, expected):
    made = n.trt.add_cast(n.input(torch.tensor(values)), DTYPES[dtype])
    return made, torch.tensor(expected, dtype=dtype)


@rows()
def shapes(n):
    x = data(2, 3, 1, 4)
    squeezed = n.trt.add_squeeze(n.input(x), n.ints(-2))
    made = n.trt.add_shape(n.input(x, dynamic=True)), n.trt.add_identity(n.input(x)), squeezed
    return made, (torch.tensor([2, 3, 1, 4]), x, x[:, :, 0])


@rows()
def squeeze_all(n):
    shape = n.trt.add_input("x0", trt.DataType.FLOAT, (1, -1, 3, 1))
    n.feeds["x0"] = data(1, 2, 3, 1)
    return _squeeze_all(n, shape), data(2, 3)


def _squeeze_all(n, x):
    try:
        return n.trt.add_squeeze(x)
    except TypeError:
        pytest.skip("this TensorRT wants the axes of a squeeze")


@rows()
def unsqueeze(n):
    return n.trt.add_unsqueeze(n.input(data(2, 3)), n.ints(-1, 0, 2)), data(2, 3)[None, :, None, :, None]


def _quantized(x, scale, low=-128, high=127):
    pairs = [zip(*lines) for lines in zip(x.tolist(), scale.tolist())]
    return torch.tensor([[min(max(round(value / unit), low), high) for value, unit in line] for line in pairs])


@rows(torch.float32, HALF)
def quantize(n, dtype):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.75], [-300.0, 300.0, 0.25, -1.5]], dtype=dtype)
    one, per_row = torch.tensor(0.5, dtype=dtype), torch.tensor([0.5, 4.0], dtype=dtype)
    source, made = n.input(x), []
    for scale, axis in ((one, -1), (per_row, 0)):
        scale = n.constant(scale)
        q = setting(n.trt.add_quantize(source, scale, trt.DataType.INT8), axis=axis)
        made += [q, setting(n.trt.add_dequantize(q.get_output(0), scale, DTYPES[dtype]), axis=axis)]
    a = _quantized(x, one.expand(2, 4))
    b = _quantized(x, per_row[:, None].expand(2, 4))
    return tuple(made), (a.to(torch.int8), (a * 0.5).to(dtype), b.to(torch.int8), (b * per_row[:, None]).to(dtype))


@rows()
def quantize_blocks(n):
    x, scale = 3 * data(2, 6), torch.tensor([[0.5, 1.0], [0.25, 2.0]])
    scales = n.constant(scale)
    q = n.trt.add_quantize(n.input(x), scales, trt.DataType.INT4)
    back = n.trt.add_dequantize(q.get_output(0), scales, trt.DataType.FLOAT)
    wide = torch.stack([scale[:, i // 3] for i in range(6)], 1)
    return back, _quantized(x, wide, -8, 7) * wide


@rows()
def quantized_weights(n):
    """Both kept and packed four bit weights, with blocks along the first axis and with a zero point."""
    kept, scale = whole(4, 3, low=-8, high=8, dtype=torch.int8), torch.tensor([[0.5, 1.0, 4.0], [0.25, 2.0, 3.0]])
    n.stored[n.trt.num_layers, "weights"] = kept
    weights = n.trt.add_constant((4, 3), trt.Weights(trt.DataType.INT4, kept.data_ptr(), 12)).get_output(0)
    made = n.trt.add_dequantize(weights, n.constant(scale), trt.DataType.FLOAT)
    setting(made, block_shape=(2, 1))
    eight = n.trt.add_dequantize(n.constant(kept), n.constant(torch.tensor(0.5)), trt.DataType.HALF)
    eight.set_input(2, n.constant(torch.tensor(0, dtype=torch.int8)))
    return (made, eight), (kept * scale.repeat_interleave(2, 0), (kept * 0.5).half())


@rows()
def quantize_fp8(n):
    x = torch.tensor([0.3, 17.0, -1000.0, 449.0])
    scale = n.constant(torch.tensor(0.5))
    q = n.trt.add_quantize(n.input(x), scale, trt.DataType.FP8)
    # of the quotients 0.6 rounds to 0.625, 34 to the even 32, and the rest saturates at 448
    return n.trt.add_dequantize(q.get_output(0), scale, trt.DataType.FLOAT), [0.3125, 16.0, -224.0, 224.0]


@rows()
def int4_weights(n):
    packed = torch.tensor([0x21, 0xF8, 0x07], dtype=torch.uint8)
    n.stored[n.trt.num_layers, "weights"] = packed
    weights = n.trt.add_constant((2, 3), trt.Weights(trt.DataType.INT4, packed.data_ptr(), 6)).get_output(0)
    made = n.trt.add_dequantize(weights, n.constant(torch.tensor(0.5)), trt.DataType.FLOAT)
    return made, [[0.5, 1.0, -4.0], [-0.5, 3.5, 0.0]]


# ---- reductions and normalization


@rows(*itertools.product((Reduce.SUM, Reduce.PROD, Reduce.MAX, Reduce.MIN, Reduce.AVG), ((1,), (0, 2)), (True, False)))
def reduce(n, op, axes, keep):
    x, numbers = data(2, 3, 4), whole(2, 3, 4, dtype=torch.int32)
    mask = sum(1 << a for a in axes)
    compute = {"SUM": np.sum, "PROD": np.prod, "MAX": np.max, "MIN": np.min, "AVG": np.mean}[op.name]
    made = [n.trt.add_reduce(n.input(t), op, mask, keep) for t in (x, numbers)]
    return tuple(made), (
        torch.from_numpy(np.asarray(compute(x.numpy(), axis=axes, keepdims=keep))),
        torch.from_numpy(np.trunc(compute(numbers.numpy(), axis=axes, keepdims=keep))).int(),
    )


@rows(
    (Reduce.SUM, 0.0, 0),
    (Reduce.PROD, 1.0, 1),
    (Reduce.MAX, -math.inf, -(2**31)),
    (Reduce.MIN, math.inf, 2**31 - 1),
    (Reduce.AVG, math.nan, 0),
)
def reduce_nothing(n, op, real, number):
    made = n.trt.add_reduce(n.input(torch.empty(2, 0)), op, 2, False)
    kept = n.trt.add_reduce(n.input(torch.empty(2, 0, 3, dtype=torch.int32)), op, 2, True)
    return (made, kept), (torch.full((2,), real), torch.full((2, 1, 3), number, dtype=torch.int32))


@rows()
def reduce_half_in_float(n):
    x = torch.tensor([[2048.0, 1, 1, 1]], dtype=HALF)
    made = n.trt.add_reduce(n.input(x), Reduce.SUM, 2, False), n.trt.add_reduce(n.input(x), Reduce.AVG, 2, False)
    return made, (torch.tensor([2052.0], dtype=HALF), torch.tensor([2051 / 4], dtype=HALF))


@rows((False, False), (True, False), (False, True), (True, True))
def cumulative(n, exclusive, reverse):
    x, axis = whole(2, 4), n.constant(torch.tensor(-1))
    layer = n.trt.add_cumulative(n.input(x), axis, trt.CumulativeOperation.SUM, exclusive, reverse)
    chosen = {
        (False, False): lambda j: range(j + 1),
        (False, True): lambda j: range(j, 4),
        (True, False): range,
        (True, True): lambda j: range(j + 1, 4),
    }[exclusive, reverse]
    return layer, [[sum(row[i] for i in chosen(j)) for j in range(4)] for row in x.tolist()]


@rows((0, torch.float32), (2, torch.float32), (1, HALF))
def softmax(n, axis, dtype):
    x = 3 * data(2, 3, 4, dtype=dtype)
    shares = x.float().exp()
    return setting(n.trt.add_softmax(n.input(x)), axes=1 << axis), (shares / shares.sum(axis, keepdim=True)).to(dtype)


@rows()
def ragged_softmax(n):
    x, lengths = data(1, 2, 5), torch.tensor([[[5], [3]]], dtype=torch.int32)
    expected = torch.zeros(1, 2, 5)
    expected[0, 0], expected[0, 1, :3] = x[0, 0].softmax(0), x[0, 1, :3].softmax(0)
    return n.trt.add_ragged_softmax(n.input(x), n.input(lengths)), expected


@rows((trt.TopKOperation.MAX, False), (trt.TopKOperation.MIN, True))
def topk(n, op, dynamic):
    x = torch.tensor([[3.0, 5, 3, -1], [0, 0, 7, 8]])
    layer = n.trt.add_topk(n.input(x), op, 3, 2)
    if dynamic:
        layer.set_input(1, n.constant(torch.tensor(3, dtype=torch.int32)))
    order = [sorted(range(4), key=lambda i: -r[i] if op.name == "MAX" else r[i])[:3] for r in x.tolist()]
    index = torch.tensor(order)
    return (layer, layer.get_output(1)), (x.gather(1, index), index.int())


@rows((0b110, (3, 4)), (0b100, (4,)))
def normalization(n, axes, shape):
    x, scale, bias = data(2, 3, 4), data(*shape), data(*shape, seed=1)
    add = getattr(n.trt, "add_normalization_v2", n.trt.add_normalization)
    wide = [n.input(t.reshape((1,) * (3 - t.ndim) + t.shape)) for t in (scale, bias)]
    return setting(add(n.input(x), *wide, axes), epsilon=0.01), F.layer_norm(x, shape, scale, bias, 0.01)


@rows((1, HALF), (2, torch.float32), (3, torch.float32))
def group_normalization(n, groups, dtype):
    x, scale, bias = data(2, 6, 4, 5, dtype=dtype), data(6, dtype=dtype), data(6, dtype=dtype, seed=1)
    add = n.trt.add_normalization_v2
    made = add(n.input(x), n.input(scale.reshape(1, 6, 1, 1)), n.input(bias.reshape(1, 6, 1, 1)), 0b1100)
    if groups == 1:
        return made, F.instance_norm(x.float(), weight=scale.float(), bias=bias.float()).to(dtype)
    return setting(made, num_groups=groups), F.group_norm(x, groups, scale, bias)


@rows()
def group_normalization_v1(n):
    x, scale, bias = data(2, 6, 4, 5), data(1, 3, 1, 1), data(1, 3, 1, 1, seed=1)
    made = setting(n.trt.add_normalization(n.input(x), n.input(scale), n.input(bias), 0b1100), num_groups=3)
    wide = [t.reshape(3).repeat_interleave(2) for t in (scale, bias)]
    return made, F.group_norm(x, 3, *wide)


@rows()
def lrn(n):
    """The second as measured on a GPU: NVIDIA/trt-samples-for-hackathon-cn, cookbook, LRN layer."""
    x = data(2, 7, 3, 4)
    known, seen = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([1.0, 2, 5], [0.59996396, 0.19999799, 0.51723605]))
    made = n.trt.add_lrn(n.input(x), 5, 0.3, 0.6, 1.5), n.trt.add_lrn(n.input(known), 3, 1.0, 1.0, 1e-4)
    return made, (F.local_response_norm(x, 5, 0.3, 0.6, 1.5), seen)


# ---- products


@rows(
    (Matrix.NONE, (2, 3, 4), Matrix.NONE, (1, 4, 5), "bij,cjk->bik"),
    (Matrix.TRANSPOSE, (4, 3), Matrix.NONE, (4, 5), "ji,jk->ik"),
    (Matrix.NONE, (2, 3, 4), Matrix.TRANSPOSE, (2, 5, 4), "bij,bkj->bik"),
    (Matrix.NONE, (2, 3, 4), Matrix.VECTOR, (2, 4), "bij,bj->bi"),
    (Matrix.VECTOR, (2, 4), Matrix.NONE, (2, 4, 3), "bj,bjk->bk"),
    (Matrix.VECTOR, (4,), Matrix.TRANSPOSE, (3, 4), "j,kj->k"),
    (Matrix.VECTOR, (2, 4), Matrix.VECTOR, (2, 4), "bj,bj->b"),
    (Matrix.NONE, (3, 0), Matrix.NONE, (0, 2), "ij,jk->ik"),
)
def matrix_multiply(n, op0, shape0, op1, shape1, equation):
    a, b = data(*shape0), data(*shape1, seed=1)
    return n.trt.add_matrix_multiply(n.input(a), op0, n.input(b), op1), torch.from_numpy(np.einsum(equation, a, b))


@rows()
def matrix_multiply_half_in_float(n):
    a, b = torch.tensor([[2048.0, 1, 1, 1]], dtype=HALF), torch.ones(4, 1, dtype=HALF)
    made = n.trt.add_matrix_multiply(n.input(a), Matrix.NONE, n.input(b), Matrix.NONE)
    return made, torch.tensor([[2052.0]], dtype=HALF)


@rows(
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("ba,bc", (2, 3), (2, 4)),
    ("i,j->ji", (2,), (3,)),
    ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("ab,b->", (2, 3), (3,)),
)
def einsum(n, equation, shape0, shape1):
    a, b = data(*shape0), data(*shape1, seed=1)
    return n.trt.add_einsum([n.input(a), n.input(b)], equation), torch.from_numpy(np.asarray(np.einsum(equation, a, b)))


def _attend(n, q, k, v, norm="SOFTMAX", causal="NONE", mask=None):
    norm = getattr(trt.AttentionNormalizationOp, norm)
    kind = getattr(trt.CausalMaskKind, causal)
    layer = setting(n.trt.add_attention_v2(n.input(q), n.input(k), n.input(v), norm, kind), decomposable=True)
    if mask is not None:
        layer.mask = n.input(mask)
    return layer.get_output(0)


QUERY, KEY, VALUE = data(2, 4, 3, 8), data(2, 2, 5, 8, seed=1), data(2, 2, 5, 8, seed=2)


@rows("none", "bool", "additive", "UPPER_LEFT", "LOWER_RIGHT", "half")
def attention(n, kind):
    q, k, v, mask = QUERY, KEY, VALUE, None
    if kind == "bool":
        mask = whole(2, 1, 3, 5, low=0, high=2).bool() | torch.eye(3, 5).bool()
    if kind == "additive":
        mask = data(1, 4, 3, 5, seed=5)
    if kind == "half":
        q, k, v = q.half(), k.half(), v.half()
    made = _attend(n, q, k, v, causal=kind if kind.isupper() else "NONE", mask=mask)
    if kind.isupper():
        shift = 2 if kind == "LOWER_RIGHT" else 0
        mask = torch.tensor([[j <= i + shift for j in range(5)] for i in range(3)])
    return made, F.scaled_dot_product_attention(q, k, v, mask, scale=1.0, enable_gqa=True)


@rows()
def attention_causal_flag(n):
    softmax_ = trt.AttentionNormalizationOp.SOFTMAX
    made = n.trt.add_attention(n.input(QUERY), n.input(KEY), n.input(VALUE), softmax_, True)
    expected = F.scaled_dot_product_attention(QUERY, KEY, VALUE, is_causal=True, scale=1.0, enable_gqa=True)
    return setting(made, decomposable=True).get_output(0), expected


@rows((False, 0, False), (True, 0, True), (False, 4, True), (True, 4, False))
def rotary_embedding(n, interleaved, size, positions):
    x, turned = data(2, 3, 5, 8), size or 8
    where = whole(2, 5, low=0, high=9)
    angles = data(*((9, turned // 2) if positions else (2, 5, turned // 2)))
    layer = n.trt.add_rotary_embedding(n.input(x), n.input(angles.cos()), n.input(angles.sin()), interleaved, size)
    if positions:
        layer.set_input(3, n.input(where))
    angles = (angles[where] if positions else angles)[:, None]
    half = turned // 2
    first, second = (slice(0, turned, 2), slice(1, turned, 2)) if interleaved else (slice(half), slice(half, turned))
    y = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles)
    expected = x.clone()
    expected[..., first], expected[..., second] = y.real, y.imag
    return layer, expected


# ---- windows


@rows((1, torch.float32), (2, torch.float32), (2, HALF))
def convolution(n, groups, dtype):
    x, k, b = data(2, 4, 9, 8, dtype=dtype), data(6, 4 // groups, 3, 2, dtype=dtype), data(6, dtype=dtype)
    layer = n.trt.add_convolution_nd(n.input(x), 6, (3, 2), numpy_weights(k), numpy_weights(b))
    setting(layer, stride_nd=(2, 1), dilation_nd=(1, 2), pre_padding=(2, 0), post_padding=(0, 3), num_groups=groups)
    y = F.conv2d(F.pad(x, (0, 3, 2, 0)).float(), k.float(), b.float(), (2, 1), 0, (1, 2), groups)
    return layer, y.to(dtype)


@rows()
def convolution_of_tensors(n):
    x, k, b = data(2, 3, 6, 5), data(4, 3, 3, 2), data(4)
    layer = n.trt.add_convolution_nd(n.input(x), 4, (3, 2), trt.Weights(), trt.Weights())
    layer.set_input(1, n.input(k))
    layer.set_input(2, n.input(b))
    return layer, F.conv2d(x, k, b)


@rows()
def convolution_3d_without_bias(n):
    x, k = data(2, 2, 5, 6, 7), data(3, 2, 2, 3, 1)
    layer = n.trt.add_convolution_nd(n.input(x), 3, (2, 3, 1), numpy_weights(k))
    return setting(layer, stride_nd=(1, 2, 3), padding_nd=(1, 0, 2)), F.conv3d(x, k, None, (1, 2, 3), (1, 0, 2))


@rows()
def convolution_of_stored_bfloat16(n):
    x, k, b = (data(*shape, dtype=BF16) for shape in ((1, 2, 4, 4), (3, 2, 2, 2), (3,)))
    n.stored.update({(0, "kernel"): k, (0, "bias"): b})
    weights = [trt.Weights(trt.DataType.BF16, t.data_ptr(), t.numel()) for t in (k, b)]
    n.kept = k, b
    layer = n.trt.add_convolution_nd(n.input(x), 3, (2, 2), *weights)
    return layer, F.conv2d(x.float(), k.float(), b.float()).to(BF16)


@rows((Pad.EXPLICIT_ROUND_UP, (0, 1, 0, 0)), (Pad.SAME_UPPER, (0, 1, 1, 1)), (Pad.SAME_LOWER, (1, 0, 1, 1)))
def convolution_padding_mode(n, mode, pads):
    x, k = data(1, 2, 7, 6), data(3, 2, 3, 3)
    layer = n.trt.add_convolution_nd(n.input(x), 3, (3, 3), numpy_weights(k))
    return setting(layer, stride_nd=(2, 2), padding_mode=mode), F.conv2d(F.pad(x, pads), k, None, 2)


@rows()
def convolution_with_more_batch(n):
    x, k = data(2, 3, 4, 5, 6), data(2, 4, 2, 3)
    layer = n.trt.add_convolution_nd(n.input(x), 2, (2, 3), numpy_weights(k))
    return layer, torch.stack([F.conv2d(part, k) for part in x])


@rows((1, (1, 1)), (2, (1, 1)), (1, (2, 1)))
def deconvolution(n, groups, dilation):
    x, k, b = data(2, 4, 5, 3), data(4, 6 // groups, 3, 2), data(6)
    stride = (2, 3) if dilation == (1, 1) else (1, 1)
    layer = n.trt.add_deconvolution_nd(n.input(x), 6, (3, 2), numpy_weights(k), numpy_weights(b))
    setting(layer, stride_nd=stride, dilation_nd=dilation, pre_padding=(1, 0), post_padding=(0, 1), num_groups=groups)
    return layer, F.conv_transpose2d(x, k, b, stride, 0, 0, groups, dilation)[:, :, 1:, :-1]


@rows()
def deconvolution_of_tensors_3d(n):
    x, k, b = data(1, 2, 3, 4, 5), data(2, 3, 2, 2, 3), data(3)
    layer = n.trt.add_deconvolution_nd(n.input(x), 3, (2, 2, 3), trt.Weights(), trt.Weights())
    layer.set_input(1, n.input(k))
    layer.set_input(2, n.input(b))
    return setting(layer, stride_nd=(2, 1, 2), padding_nd=(0, 1, 1)), F.conv_transpose3d(x, k, b, (2, 1, 2), (0, 1, 1))


@rows(Pad.SAME_UPPER, Pad.SAME_LOWER)
def deconvolution_same(n, mode):
    x, k = data(1, 2, 4, 3), data(2, 3, 5, 2)
    layer = n.trt.add_deconvolution_nd(n.input(x), 3, (5, 2), numpy_weights(k))
    full = F.conv_transpose2d(x, k, None, (2, 3))  # 11 by 8, of which 8 by 8 are the same
    cropped = full[:, :, 1:-2] if mode == Pad.SAME_UPPER else full[:, :, 2:-1]
    return setting(layer, stride_nd=(2, 3), padding_mode=mode), cropped


def _pool(x, window, stride, pre, post, compute, up=False):
    """Pooling by loops: `compute` gets a window's data and how many places of the padded input it covers."""
    size = [(n + a + b - w) / s for n, a, b, w, s in zip(x.shape[-2:], pre, post, window, stride)]
    h, w = (math.ceil(v) + 1 if up else math.floor(v) + 1 for v in size)
    y = np.zeros((*x.shape[:2], h, w), np.float32)
    for b, c, i, j in np.ndindex(*y.shape):
        seen, places = [], 0
        for di, dj in np.ndindex(*window):
            at = i * stride[0] + di - pre[0], j * stride[1] + dj - pre[1]
            places += all(p < n + after for p, n, after in zip(at, x.shape[-2:], post))
            if all(0 <= p < n for p, n in zip(at, x.shape[-2:])):
                seen.append(float(x[b, c, at[0], at[1]]))
        y[b, c, i, j] = compute(seen, places)
    return torch.from_numpy(y)


POOLINGS = {
    "max": (Pool.MAX, True, lambda seen, places: max(seen)),
    "average": (Pool.AVERAGE, True, lambda seen, places: sum(seen) / len(seen)),
    "including": (Pool.AVERAGE, False, lambda seen, places: sum(seen) / places),
    "blend": (Pool.MAX_AVERAGE_BLEND, True, lambda seen, places: 0.7 * max(seen) + 0.3 * sum(seen) / len(seen)),
}


@rows(*(row for row in itertools.product(POOLINGS, (False, True)) if row != ("including", True)))
def pooling(n, name, up):
    kind, excluding, compute = POOLINGS[name]
    x = data(2, 3, 6, 7)
    layer = n.trt.add_pooling_nd(n.input(x), kind, (3, 3))
    setting(layer, stride_nd=(3, 2), pre_padding=(1, 0), post_padding=(0, 1), average_count_excludes_padding=excluding)
    setting(layer, padding_mode=Pad.EXPLICIT_ROUND_UP if up else Pad.EXPLICIT_ROUND_DOWN)
    if kind == Pool.MAX_AVERAGE_BLEND:
        layer.blend_factor = 0.3
    return layer, _pool(x, (3, 3), (3, 2), (1, 0), (0, 1), compute, up)


@rows((Pool.MAX, F.max_pool2d, {}), (Pool.AVERAGE, F.avg_pool2d, {"count_include_pad": True}))
def pooling_like_torch(n, kind, expected, arguments):
    x = data(2, 3, 7, 6, dtype=HALF)
    layer = setting(n.trt.add_pooling_nd(n.input(x), kind, (3, 2)), stride_nd=(2, 1), padding_nd=(1, 1))
    layer.average_count_excludes_padding = False
    return layer, expected(x.float(), (3, 2), (2, 1), (1, 1), **arguments).half()


@rows(Pad.SAME_UPPER, Pad.SAME_LOWER)
def pooling_same(n, mode):
    x = data(1, 2, 7, 6)
    layer = setting(n.trt.add_pooling_nd(n.input(x), Pool.AVERAGE, (3, 3)), stride_nd=(2, 2), padding_mode=mode)
    pre, post = ((1, 0), (1, 1)) if mode == Pad.SAME_UPPER else ((1, 1), (1, 0))
    return layer, _pool(x, (3, 3), (2, 2), pre, post, lambda seen, places: sum(seen) / len(seen))


@rows()
def pooling_3d(n):
    x = data(2, 3, 5, 6, 7)
    layer = n.trt.add_pooling_nd(n.input(x), Pool.AVERAGE, (2, 3, 4))
    expected = F.avg_pool3d(x, (2, 3, 4), (1, 2, 3), (0, 1, 2), count_include_pad=False)
    return setting(layer, stride_nd=(1, 2, 3), padding_nd=(0, 1, 2)), expected


@rows()
def padding(n):
    x = data(2, 3, 4, 5)
    return n.trt.add_padding_nd(n.input(x), (1, -1), (0, 2)), F.pad(x, (-1, 2, 1, 0))


# ---- moving data


@rows(
    ((1, 2, 0), None, None, lambda x: x.permute(1, 2, 0)),
    (None, (4, -1), None, lambda x: x.reshape(4, 6)),
    ((2, 0, 1), (0, 0, 3, 1), (3, 2, 0, 1), lambda x: x.permute(2, 0, 1).reshape(4, 2, 3, 1).permute(3, 2, 0, 1)),
    (None, (24,), None, lambda x: x.flatten()),
)
def shuffle(n, first, shape, second, expected):
    x = data(2, 3, 4)
    given = {"first_transpose": first, "reshape_dims": shape, "second_transpose": second}
    layer = n.trt.add_shuffle(n.input(x))
    return setting(layer, **{k: v for k, v in given.items() if v is not None}), expected(x)


@rows()
def shuffle_dynamic(n):
    x, empty = data(2, 3, 4), torch.empty(0, 3)
    layer, none = n.trt.add_shuffle(n.input(x, dynamic=True)), n.trt.add_shuffle(n.input(empty))
    layer.set_input(1, n.ints(0, -1))
    setting(none, zero_is_placeholder=False).reshape_dims = (3, 0)
    scalar = setting(n.trt.add_shuffle(n.input(data(1))), reshape_dims=())
    return (layer, none, scalar), (x.reshape(2, 12), empty.reshape(3, 0), data(1)[0])


def _reads(i, n, mode):
    """Where a sample mode reads, one reflection at a time."""
    while not 0 <= i < n and mode != "FILL":
        if mode == "WRAP":
            i += n if i < 0 else -n
        elif mode == "CLAMP":
            i += 1 if i < 0 else -1
        else:
            i = 0 if n == 1 else -i if i < 0 else 2 * (n - 1) - i
    return i if 0 <= i < n else None


SLICES = [
    ("STRICT_BOUNDS", (0, 3), (2, 2), (1, -2)),
    ("STRICT_BOUNDS", (1, 2), (3, 2), (0, 1)),
    ("STRICT_BOUNDS", (0, 0), (2, 0), (1, 1)),
    ("WRAP", (-3, 2), (5, 9), (1, 2)),
    ("CLAMP", (-1, 7), (4, 9), (1, -1)),
    ("FILL", (-1, -2), (4, 8), (1, 1)),
    ("REFLECT", (-1, -9), (4, 13), (1, 2)),
    ("REFLECT", (3, 6), (3, 5), (-2, 1)),
]


@rows(*SLICES)
def slice_modes(n, mode, start, size, stride):
    x = data(2, 5)
    made = setting(n.trt.add_slice(n.input(x), start, size, stride), mode=getattr(Sample, mode))
    expected = torch.zeros(size)
    for i, j in np.ndindex(*size):
        at = [_reads(s + k * step, d, mode) for s, k, step, d in zip(start, (i, j), stride, x.shape)]
        expected[i, j] = 0 if None in at else x[tuple(at)]
    return made, expected


@rows(("REFLECT", "reflect"), ("CLAMP", "replicate"), ("WRAP", "circular"), ("FILL", "constant"))
def slice_pads(n, mode, name):
    x = data(2, 3, 4, 5)
    made = n.trt.add_slice(n.input(x), (0, 0, -2, -1), (2, 3, 9, 9), (1, 1, 1, 1))
    return setting(made, mode=getattr(Sample, mode)), F.pad(x, (1, 3, 2, 3), mode=name)


@rows()
def slice_reflects_one(n):
    return setting(n.trt.add_slice(n.input(data(1)), (-2,), (4,), (1,)), mode=Sample.REFLECT), data(1).expand(4)


@rows()
def slice_fills(n):
    made, numbers, flags, half = [], torch.tensor([4, 3, 2]), torch.tensor([True, False]), torch.ones(3, dtype=HALF)
    for x, value in ((numbers, -5), (flags, True), (half, 1.5)):
        layer = setting(n.trt.add_slice(n.input(x), (-1,), (3,), (1,)), mode=Sample.FILL)
        layer.set_input(4, n.constant(torch.tensor(value)))
        made.append(layer)
    return tuple(made), ([-5, 4, 3], [True, True, False], torch.tensor([1.5, 1, 1], dtype=HALF))


@rows()
def slice_dynamic(n):
    x = data(4, 5)
    source = n.input(x, dynamic=True)
    every = n.trt.add_slice(source, (0, 0), (1, 1), (1, 1))
    for i, values_ in enumerate(((3, 1), (2, 2), (-2, 3))):
        every.set_input(i + 1, n.ints(*values_))
    size = n.trt.add_slice(source, (1, 0), (1, 1), (1, 2))
    size.set_input(2, n.ints(3, 2))
    return (every, size), (x[[3, 1]][:, [1, 4]], x[1:4, [0, 2]])


@rows()
def slice_axes(n):
    x = data(2, 3, 4)
    attribute = setting(n.trt.add_slice(n.input(x), (1,), (2,), (1,)), axes=(2,))
    tensor_ = n.trt.add_slice(n.input(x), (1, 0), (2, 1), (1, 1))
    tensor_.set_input(5, n.ints(-1, 0))
    return (attribute, tensor_), (x[:, :, 1:3], x[:1, :, 1:3])


@rows()
def concatenation(n):
    parts = [data(2, 1, 3), data(2, 4, 3), torch.empty(2, 0, 3)]
    return setting(n.trt.add_concatenation([n.input(p) for p in parts]), axis=1), torch.cat(parts, 1)


@rows((0, torch.int32), (1, torch.int64), (2, torch.int32))
def gather(n, axis, dtype):
    x, index = data(3, 4, 5), whole(2, 2, low=0, high=3, dtype=dtype)
    return n.trt.add_gather(n.input(x), n.input(index), axis), torch.from_numpy(np.take(x.numpy(), index.numpy(), axis))


@rows()
def gather_scalar(n):
    x = data(3, 4)
    return n.trt.add_gather(n.input(x), n.input(torch.tensor(2)), 1), x[:, 2]


@rows()
def gather_out_of_range(n):
    x, index = data(3, 4), torch.tensor([3, -1, 1, -4, -3])
    element, columns = torch.tensor([[0, 9, -3, 2]]), torch.tensor([[0, 5], [2, 3], [-1, 0]])
    made = (
        n.trt.add_gather(n.input(x), n.input(index), 0),
        n.trt.add_gather_v2(n.input(x), n.input(element), Gather.ELEMENT),
        n.trt.add_gather_v2(n.input(x), n.input(columns), Gather.ND),
    )
    none, x = torch.zeros(4), x.clone()
    lines, items = torch.stack([none, x[2], x[1], none, x[0]]), torch.stack([x[0, 0], none[0], x[0, 2], x[2, 3]])
    return made, (lines, items[None], torch.stack([none[0], x[2, 3], x[2, 0]]))


@rows(1, 2)
def gather_with_batch(n, axis):
    x, index = data(3, 4, 5), whole(3, 2, low=0, high=4)
    made = setting(n.trt.add_gather(n.input(x), n.input(index), axis), num_elementwise_dims=1)
    return made, torch.stack([row.index_select(axis - 1, at) for row, at in zip(x, index)])


@rows()
def gather_element(n):
    x, index = data(3, 4, 5), whole(2, 6, 3, low=0, high=4)
    made = setting(n.trt.add_gather_v2(n.input(x), n.input(index), Gather.ELEMENT), axis=1)
    expected = [[[x[i, index[i, j, k], k] for k in range(3)] for j in range(6)] for i in range(2)]
    return made, torch.tensor(expected)


@rows((0, (2, 3, 2)), (1, (4, 2, 1)), (1, (4, 2, 2)), (2, (4, 3, 1)), (0, (2, 3)))
def gather_nd(n, batch, shape):
    x, index = data(4, 3, 5), whole(*shape, low=0, high=3)
    made = setting(n.trt.add_gather_v2(n.input(x), n.input(index), Gather.ND), num_elementwise_dims=batch)
    places = np.ndindex(*shape[:-1])
    picked = [x[(*at[:batch], *index[at].tolist())] for at in places]
    return made, torch.stack(picked).reshape(*shape[:-1], *picked[0].shape)


@rows()
def scatter(n):
    x, updates = data(3, 5), data(2, 4, seed=1)
    updates[0, 0] = math.nan
    index = torch.tensor([[0, 2, 1, 2], [1, 0, 2, 0]])
    element = setting(n.trt.add_scatter(n.input(x), n.input(index), n.input(updates), Scatter.ELEMENT), axis=0)
    expected = x.clone()
    for i, j in np.ndindex(2, 4):
        expected[index[i, j], j] = updates[i, j]
    places = torch.tensor([[2, 0], [1, 4]])
    flags, marks = torch.zeros(2, 3, dtype=torch.bool), torch.tensor([[True, False, True]])
    nd = n.trt.add_scatter(n.input(x), n.input(places), n.input(torch.tensor([7.0, 8])), Scatter.ND)
    lines = n.trt.add_scatter(n.input(flags), n.input(torch.tensor([[1]])), n.input(marks), Scatter.ND)
    other = x.clone()
    other[2, 0], other[1, 4] = 7, 8
    return (element, nd, lines), (expected, other, [[False] * 3, [True, False, True]])


@rows(0, 1, -1)
def one_hot(n, axis):
    index = torch.tensor([[0, 3], [2, 2], [1, 0]])
    layer = n.trt.add_one_hot(n.input(index), n.input(torch.tensor([-1.0, 4.0])), n.constant(torch.tensor(4)), axis)
    return layer, (F.one_hot(index, 4) * 5 - 1.0).movedim(-1, axis)


@rows(torch.int32, torch.int64)
def non_zero(n, dtype):
    x = torch.tensor([[0, 2, 0], [3, 0, -1]])
    return n.trt.add_non_zero(n.input(x), DTYPES[dtype]), torch.tensor([[0, 1, 1], [1, 0, 2]], dtype=dtype)


@rows((1, 0), (0, 2))
def reverse_sequence(n, batch, sequence):
    x = data(4, 3, 5)
    lengths = torch.tensor([0, 2, 4][: x.shape[batch]] + [1] * (x.shape[batch] - 3), dtype=torch.int32)
    layer = n.trt.add_reverse_sequence(n.input(x), n.input(lengths))
    expected = x.clone()
    for i, length in enumerate(lengths.tolist()):
        row = expected.select(batch, i)
        axis = sequence - (sequence > batch)
        row.narrow(axis, 0, length).copy_(x.select(batch, i).narrow(axis, 0, length).flip(axis))
    return setting(layer, batch_axis=batch, sequence_axis=sequence), expected


@rows()
def fill(n):
    made = [
        setting(n.trt.add_fill((4,), Fill.LINSPACE, trt.DataType.FLOAT), alpha=0.5, beta=-0.25),
        setting(n.trt.add_fill((4,), Fill.LINSPACE, trt.DataType.INT64), alpha=2, beta=3),
        setting(n.trt.add_fill((3,), Fill.LINSPACE, trt.DataType.INT32), alpha=2.7, beta=1.6),
    ]
    grid = n.trt.add_fill((1,), Fill.LINSPACE, trt.DataType.INT64)
    for i, value in enumerate((n.ints(3, 4), n.constant(torch.tensor(1)), n.ints(100, 10))):
        grid.set_input(i, value)
    expected = [0.5, 0.25, 0.0, -0.25], [2, 5, 8, 11], torch.tensor([2, 3, 4], dtype=torch.int32)
    return (*made, grid), (*expected, [[1, 11, 21, 31], [101, 111, 121, 131], [201, 211, 221, 231]])


# ---- sampling


@rows(
    (Mode.NEAREST, Transform.ASYMMETRIC, (7,), (11,), {"mode": "nearest"}),
    (Mode.NEAREST, Transform.ASYMMETRIC, (5, 4, 7), (3, 9, 4), {"mode": "nearest"}),
    (Mode.NEAREST, Transform.HALF_PIXEL, (5, 4), (3, 9), {"mode": "nearest-exact"}),
    (Mode.LINEAR, Transform.HALF_PIXEL, (5,), (8,), {"mode": "linear"}),
    (Mode.LINEAR, Transform.ALIGN_CORNERS, (5,), (3,), {"mode": "linear", "align_corners": True}),
    (Mode.LINEAR, Transform.HALF_PIXEL, (5, 4), (3, 9), {"mode": "bilinear"}),
    (Mode.LINEAR, Transform.ALIGN_CORNERS, (5, 4), (7, 1), {"mode": "bilinear", "align_corners": True}),
    (Mode.LINEAR, Transform.HALF_PIXEL, (5, 4, 3), (3, 9, 4), {"mode": "trilinear"}),
    (Mode.LINEAR, Transform.ALIGN_CORNERS, (5, 4, 3), (7, 2, 6), {"mode": "trilinear", "align_corners": True}),
    (Mode.CUBIC, Transform.HALF_PIXEL, (5, 6), (8, 4), {"mode": "bicubic"}),
    (Mode.CUBIC, Transform.ALIGN_CORNERS, (5, 6), (8, 9), {"mode": "bicubic", "align_corners": True}),
)
def resize(n, mode, transform, source, target, arguments):
    x = data(2, 3, *source)
    layer = setting(n.trt.add_resize(n.input(x)), shape=(2, 3, *target), resize_mode=mode)
    setting(layer, coordinate_transformation=transform)
    if transform == Transform.HALF_PIXEL and mode == Mode.NEAREST:
        layer.nearest_rounding = Round.HALF_UP
    return layer, F.interpolate(x, target, **arguments)


@rows(
    (Round.FLOOR, [0, 0, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    (Round.CEIL, [0, 1, 2, 2, 3, 3], [0, 1, 1, 2, 2, 3, 3, 4, 4, 4]),
    (Round.HALF_DOWN, [0, 1, 1, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    (Round.HALF_UP, [0, 1, 1, 2, 3, 3], [0, 1, 1, 2, 2, 3, 3, 4, 4, 4]),
)
def resize_rounding(n, rounding, lines, columns):
    """As measured on a GPU: NVIDIA/trt-samples-for-hackathon-cn, cookbook, resize layer."""
    x = data(1, 2, 4, 5)
    layer = setting(n.trt.add_resize(n.input(x)), shape=(1, 2, 6, 10), nearest_rounding=rounding)
    return layer, x[:, :, lines][:, :, :, columns]


@rows()
def resize_asymmetric_linear(n):
    x = torch.arange(20.0).reshape(1, 1, 4, 5)
    layer = setting(n.trt.add_resize(n.input(x)), shape=(1, 1, 6, 10), resize_mode=Mode.LINEAR)
    line = torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4])
    return layer, torch.stack([line + 5 * min(i * 4 / 6, 3) for i in range(6)])[None, None]


@rows((False, -0.75), (True, -0.5))
def resize_cubic(n, exclude, a):
    x, m = data(1, 1, 2, 5), 8
    layer = setting(n.trt.add_resize(n.input(x)), shape=(1, 1, 2, m), resize_mode=Mode.CUBIC)
    setting(layer, coordinate_transformation=Transform.HALF_PIXEL, cubic_coeff=a, exclude_outside=exclude)

    def weight(d):
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0

    expected = torch.zeros(1, 1, 2, m)
    for row, j in np.ndindex(2, m):
        at = (j + 0.5) * 5 / m - 0.5
        taps = [(i, weight(at - i)) for i in range(math.floor(at) - 1, math.floor(at) + 3)]
        taps = [(i, w) for i, w in taps if 0 <= i < 5] if exclude else taps
        total = sum(w for _, w in taps)
        expected[0, 0, row, j] = sum(w * float(x[0, 0, row, min(max(i, 0), 4)]) for i, w in taps) / total
    return layer, expected


@rows()
def resize_sizes(n):
    x = data(1, 1, 10, 4)
    scaled = setting(n.trt.add_resize(n.input(x)), scales=[1, 1, 1.3, 2])
    dynamic = n.trt.add_resize(n.input(x, dynamic=True))
    dynamic.set_input(1, n.ints(1, 1, 4, 9))
    rest = setting(n.trt.add_resize(n.input(x)), selector_for_single_pixel=trt.ResizeSelector.UPPER, shape=(1, 1, 1, 1))
    single = setting(n.trt.add_resize(n.input(x)), shape=(1, 1, 1, 1))
    for layer in (rest, single):
        setting(layer, resize_mode=Mode.LINEAR, coordinate_transformation=Transform.HALF_PIXEL)
    middle = F.interpolate(x, (1, 1), mode="bilinear")
    made = scaled, dynamic, rest, single
    return made, (F.interpolate(x, (13, 8)), F.interpolate(x, (4, 9)), x[:, :, :1, :1], middle)


def _grid_sample(x, grid, nearest, outside, align):
    """Two dimensional grid sampling by loops."""
    n, c, *size = x.shape
    y = torch.zeros(n, c, *grid.shape[1:3])

    def place(at, length):
        at = (at + 1) / 2 * (length - 1) if align else ((at + 1) * length - 1) / 2
        low, high = (0, length - 1) if align else (-0.5, length - 0.5)
        if outside == "REFLECT":
            while not low <= at <= high:
                at = 2 * low - at if at < low else 2 * high - at
        return min(max(at, 0), length - 1) if outside != "FILL" else at

    for b, i, j in np.ndindex(n, *grid.shape[1:3]):
        w, h = (place(float(g), length) for g, length in zip(grid[b, i, j], size[::-1]))
        taps = (
            [(round(h), round(w), 1.0)]
            if nearest
            else [
                (p, q, (1 - abs(h - p)) * (1 - abs(w - q)))
                for p in (math.floor(h), math.floor(h) + 1)
                for q in (math.floor(w), math.floor(w) + 1)
            ]
        )
        for p, q, weight in taps:
            if 0 <= p < size[0] and 0 <= q < size[1]:
                y[b, :, i, j] += weight * x[b, :, p, q]
    return y


@rows(*itertools.product((Mode.NEAREST, Mode.LINEAR), (Sample.FILL, Sample.CLAMP, Sample.REFLECT), (False, True)))
def grid_sample(n, mode, outside, align):
    x, grid = data(2, 3, 4, 5), 1.5 * data(2, 3, 6, 2)
    layer = n.trt.add_grid_sample(n.input(x), n.input(grid))
    setting(layer, interpolation_mode=mode, sample_mode=outside, align_corners=align)
    return layer, _grid_sample(x, grid, mode == Mode.NEAREST, outside.name, align)


@rows()
def grid_sample_others(n):
    x, grid, volume, places = data(2, 3, 4, 5), data(2, 3, 6, 2), data(1, 2, 3, 4, 5), data(1, 2, 3, 4, 3)
    cubic = setting(n.trt.add_grid_sample(n.input(x), n.input(grid)), interpolation_mode=Mode.CUBIC)
    trilinear = setting(n.trt.add_grid_sample(n.input(volume), n.input(places)), sample_mode=Sample.CLAMP)
    return (cubic, trilinear), (
        F.grid_sample(x, grid, "bicubic", align_corners=False),
        F.grid_sample(volume, places, padding_mode="border", align_corners=False),
    )


def _nms(boxes, scores, most, overlap, threshold, limit):
    """Non-maximum suppression by loops, per image and class; boxes are low and high corners."""
    made = []
    for image, lines in enumerate(scores.tolist()):
        scored = [(score, b, c) for b, line in enumerate(lines) for c, score in enumerate(line)]
        kept = []
        for score, b, c in sorted(scored, reverse=True)[:limit]:
            mine = [k for k in kept if k[1] == c]
            clear = all(_shared(boxes[image, k[0]].tolist(), boxes[image, b].tolist()) <= overlap for k in mine)
            if score > threshold and len(mine) < most and clear:
                kept.append((b, c))
        made += [[image, c, b] for b, c in kept]
    return torch.tensor(made, dtype=torch.int32)


def _shared(a, b):
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (area - width * height)


@rows((False, 3, 0.4, 0.1, 5000), (True, 9, 0.2, None, 5000), (False, 9, None, 0.3, 7))
def nms(n, centred, most, overlap, threshold, limit):
    low, size = 4 * torch.rand(2, 9, 2, generator=torch.Generator().manual_seed(0)), data(2, 9, 2).abs() + 1
    boxes, scores = torch.cat([low, low + size], -1), torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(1))
    given = torch.cat([low + size / 2, size] if centred else [low + size, low], -1)
    layer = n.trt.add_nms(n.input(given), n.input(scores - 0.1), n.constant(torch.tensor(most, dtype=torch.int32)))
    for i, value in ((3, overlap), (4, threshold)):
        if value is not None:
            layer.set_input(i, n.constant(torch.tensor(value)))
    setting(layer, topk_box_limit=limit)
    if centred:
        layer.bounding_box_format = trt.BoundingBoxFormat.CENTER_SIZES
    expected = _nms(boxes, scores - 0.1, most, overlap or 0, threshold or 0, limit)
    return (layer, layer.get_output(1)), (expected, torch.tensor(len(expected), dtype=torch.int32))


# ---- loops and conditionals


def _loop(n, count):
    loop = n.trt.add_loop()
    loop.add_trip_limit(count, Trip.COUNT)
    return loop


def _collect(loop, source, kind, length, axis=0):
    layer = loop.add_loop_output(source, kind, axis)
    layer.set_input(1, length)
    return layer.get_output(0)


@rows(0, 1, 5)
def loop_counts(n, trips):
    x = data(2, 3)
    loop = _loop(n, n.input(torch.tensor(trips, dtype=torch.int32)))
    state = loop.add_recurrence(n.input(x))
    state.set_input(1, n.op(state.get_output(0), state.get_output(0), Op.SUM))
    return loop.add_loop_output(state.get_output(0), Output.LAST_VALUE), x * 2**trips


@rows((Output.CONCATENATE, 0), (Output.CONCATENATE, 1), (Output.REVERSE, 0))
def loop_concatenates(n, kind, axis):
    """Engines of TensorRT for RTX only do the first."""
    count = n.constant(torch.tensor(4))
    loop = _loop(n, count)
    state = loop.add_recurrence(n.input(torch.tensor([1.0, 10])))
    step = n.op(state.get_output(0), n.constant([2.0, 3.0]), Op.PROD)
    state.set_input(1, step)
    made = [_collect(loop, t, kind, count, axis) for t in (state.get_output(0), step)]
    table = torch.tensor([[1.0, 10], [2, 30], [4, 90], [8, 270], [16, 810]])
    lines = [part.flip(0) if kind == Output.REVERSE else part for part in (table[:4], table[1:])]
    return tuple(made), tuple(part.movedim(0, axis) for part in lines)


@rows((0, False, 3), (1, False, 4), (1, True, 4), (1, True, 3))
def loop_iterates(n, axis, reverse, trips):
    x = data(3, 4)
    count = n.constant(torch.tensor(trips))
    loop = _loop(n, count)
    piece = loop.add_iterator(n.input(x), axis, reverse).get_output(0)
    total = loop.add_recurrence(n.constant(torch.zeros(x.shape[1 - axis])))
    total.set_input(1, n.op(n.op(total.get_output(0), n.constant([0.5]), Op.PROD), piece, Op.SUM))
    pieces = [x.select(axis, trips - 1 - i if reverse else i) for i in range(trips)]
    expected = torch.zeros(x.shape[1 - axis])
    for part in pieces:
        expected = expected * 0.5 + part
    last = loop.add_loop_output(total.get_output(0), Output.LAST_VALUE)
    return (last, _collect(loop, piece, Output.CONCATENATE, count)), (expected, torch.stack(pieces))


@rows((1, 4), (9, 4), (27, 200))
def loop_runs_while(n, start, most):
    """Collatz, with a conditional inside: n / 2 or 3 n + 1 until 1, or until the count is reached."""
    one, two, three = (n.ints(i) for i in (1, 2, 3))
    loop = _loop(n, n.constant(torch.tensor(most, dtype=torch.int32)))
    number, trips = loop.add_recurrence(n.input(torch.tensor([start]))), loop.add_recurrence(n.ints(0))
    now = number.get_output(0)
    flat = lambda t: setting(n.trt.add_shuffle(t), reshape_dims=()).get_output(0)  # noqa: E731
    loop.add_trip_limit(flat(n.op(now, one, Op.GREATER)), Trip.WHILE)
    halved = n.op(now, two, Op.FLOOR_DIV)
    even = n.op(n.op(halved, two, Op.PROD), now, Op.EQUAL)
    choice = n.trt.add_if_conditional()
    choice.set_condition(flat(even))
    inner = choice.add_input(now).get_output(0)
    grown = n.op(n.op(inner, three, Op.PROD), one, Op.SUM)
    number.set_input(1, choice.add_output(n.op(inner, two, Op.FLOOR_DIV), grown).get_output(0))
    trips.set_input(1, n.op(trips.get_output(0), one, Op.SUM))
    value, steps = start, 0
    while value > 1 and steps < most:
        value, steps = value // 2 if value % 2 == 0 else 3 * value + 1, steps + 1
    made = [loop.add_loop_output(t.get_output(0), Output.LAST_VALUE) for t in (number, trips)]
    return tuple(made), ([value], [steps])


@rows()
def loops_nest(n):
    """Each row's sum is weighted by what came before; the inner loop iterates over a slice of the outer one."""
    x = whole(3, 4)
    rows_, columns = n.constant(torch.tensor(3)), n.constant(torch.tensor(4))
    outer, source = _loop(n, rows_), n.input(x)
    total = outer.add_recurrence(n.constant(torch.tensor(1)))
    row = outer.add_iterator(source).get_output(0)
    doubled = n.op(row, n.ints(2), Op.PROD)
    inner = _loop(n, columns)
    part = inner.add_recurrence(total.get_output(0))
    item = inner.add_iterator(doubled).get_output(0)
    offset = n.op(total.get_output(0), n.constant(torch.tensor(7)), Op.SUM)
    part.set_input(1, n.op(n.op(part.get_output(0), item, Op.SUM), offset, Op.SUM))
    after = inner.add_loop_output(part.get_output(0), Output.LAST_VALUE).get_output(0)
    trail = _collect(inner, part.get_output(0), Output.CONCATENATE, columns)
    total.set_input(1, after)
    last = outer.add_loop_output(total.get_output(0), Output.LAST_VALUE)
    made = last, _collect(outer, trail, Output.CONCATENATE, rows_)
    state, trails = 1, []
    for line in x.tolist():
        value, mine = state, []
        for number in line:
            mine.append(value)
            value = value + 2 * number + state + 7
        state = value
        trails.append(mine)
    return made, (state, trails)


@rows(True, False)
def conditional(n, taken):
    """Two outputs, one straight from outside; the branch not taken would divide by zero."""
    x, zero = torch.tensor([6, -4]), torch.tensor([0, 1] if taken else [2, 1])
    choice = n.trt.add_if_conditional()
    choice.set_condition(n.input(torch.tensor(taken)))
    source = n.input(x)
    inside, divisor = choice.add_input(source).get_output(0), choice.add_input(n.input(zero)).get_output(0)
    bad = n.op(inside, divisor, Op.DIV)
    first = choice.add_output(n.op(inside, n.ints(5), Op.SUM), bad).get_output(0)
    second = choice.add_output(source, n.op(bad, inside, Op.SUM)).get_output(0)
    both = n.op(first, second, Op.SUM)
    a, b = (x + 5, x) if taken else (x // zero, x // zero + x)
    return (first, second, both), (a, b, a + b)


@rows((True, 3), (False, 3), (True, -2))
def conditional_around_a_loop(n, taken, start):
    count = n.constant(torch.tensor(3))
    choice, source = n.trt.add_if_conditional(), n.input(torch.tensor([start]))
    choice.set_condition(n.input(torch.tensor(taken)))
    inside = choice.add_input(source).get_output(0)
    loop = _loop(n, count)
    state = loop.add_recurrence(inside)
    state.set_input(1, n.op(state.get_output(0), inside, Op.SUM))
    grown = loop.add_loop_output(state.get_output(0), Output.LAST_VALUE).get_output(0)
    return choice.add_output(grown, inside), [start * 4 if taken else start]


# ---- all of the above


def engine_outputs(net, names):
    """What the real engine makes of the network; skips what TensorRT does not build."""
    config, profile = net.builder.create_builder_config(), net.builder.create_optimization_profile()
    config.clear_flag(trt.BuilderFlag.TF32)
    sources = [net.trt.get_input(i) for i in range(net.trt.num_inputs)]
    for source in sources:
        value = net.feeds[source.name]
        if source.is_shape_tensor:
            profile.set_shape_input(source.name, *[value.reshape(-1).tolist()] * 3)
        elif -1 in tuple(source.shape):
            profile.set_shape(source.name, *[tuple(value.shape)] * 3)
    if any(source.is_shape_tensor or -1 in tuple(source.shape) for source in sources):
        config.add_optimization_profile(profile)
    runtime = trt.Runtime(LOG)
    with LOG.capture() as log:
        plan = net.builder.build_serialized_network(net.trt, config)
        engine = None if plan is None else runtime.deserialize_cuda_engine(plan)
        context = None if engine is None else engine.create_execution_context()
    if context is None:
        pytest.skip(f"TensorRT does not run this: {log[0] if log else 'no reason given'}")
    spare, held = torch.empty(256, dtype=torch.uint8, device="cuda"), {}
    for name, value in net.feeds.items():
        host = engine.get_tensor_location(name) == trt.TensorLocation.HOST
        held[name] = value.cpu().contiguous() if host else value.cuda().contiguous()
        context.set_input_shape(name, tuple(value.shape))
        context.set_tensor_address(name, held[name].data_ptr() or spare.data_ptr())
    for name in names:
        dtype = next(key for key, value in DTYPES.items() if value == engine.get_tensor_dtype(name))
        held[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
        context.set_tensor_address(name, held[name].data_ptr() or spare.data_ptr())
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return [held[name].cpu() for name in names]


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_layer(function, arguments, device):
    net = Net()
    made, expected = function(net, *arguments)
    made, expected = tuples(made), tuples(expected)
    assert len(made) == len(expected)
    results = net.evaluate(*made, device=device)
    for result, value in zip(results, expected):
        same(result, value)
    if device.type == "cuda":
        for result, value in zip(results, engine_outputs(net, [tensor(m).name for m in made])):
            same(value, result, loosely=True)


def test_weights_are_read_back_without_a_table():
    net = Net()
    x, k = data(1, 2, 4, 4), numpy_weights(data(3, 2, 2, 2))
    conv = net.trt.add_convolution_nd(net.input(x), 3, (2, 2), k)
    made = net.op(conv.get_output(0), net.constant(data(1, 3, 1, 1)), Op.SUM)
    same(net.evaluate(made, stored=False)[0], F.conv2d(x, torch.from_numpy(k)) + data(1, 3, 1, 1))


def test_evaluator_is_ready_for_other_sizes():
    net = Net()
    x = net.input(data(2, 3), dynamic=True)
    made = setting(net.trt.add_softmax(x), axes=2).get_output(0)
    net.trt.mark_output(made)
    ready = Evaluator(net.trt)
    for shape in ((2, 3), (5, 1), (1, 7)):
        same(ready({"x0": data(*shape)})[made.name], data(*shape).softmax(1))


def test_outputs_are_copies():
    net = Net()
    x, kept = data(2, 3), data(3)
    first = net.evaluate(net.trt.add_identity(net.input(x)), net.constant(kept))
    for value in first:
        value.zero_()
    assert net.feeds["x0"].any() and kept.any()


def test_deep_networks_do_not_recurse_and_free_what_is_done():
    net = Net()
    x = net.input(data(4))
    one = net.constant(torch.ones(1))
    for _ in range(3000):
        x = net.op(x, one, Op.SUM)
    net.trt.mark_output(x)
    ready = Evaluator(net.trt, net.stored)
    alive, most = {"x0", one.name}, 0
    for step in ready.plan.steps:
        alive.update(step.makes)
        most = max(most, len(alive))
        alive.difference_update(step.done_with)
    assert most <= 3 and alive == {x.name}
    same(ready(net.feeds)[x.name], sum((torch.ones(4) for _ in range(3000)), data(4)))


def test_layers_may_come_before_what_they_read():
    net = Net()
    x = net.input(data(2, 3))
    early = net.trt.add_unary(x, Unary.NEG)
    early.set_input(0, net.trt.add_unary(x, Unary.EXP).get_output(0))
    same(net.evaluate(early)[0], -data(2, 3).exp())


def test_the_evaluator_lets_go_of_inputs():
    net = Net()
    net.trt.mark_output(tensor(net.trt.add_unary(net.input(data(2)), Unary.NEG)))
    ready, x = Evaluator(net.trt), data(2)
    ready({"x0": x})
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


# ---- refusals


def _mixed_types(n):
    return n.op(n.input(data(2)), n.input(data(2, dtype=HALF)), Op.SUM)


def _random(n):
    return n.trt.add_fill((2,), Fill.RANDOM_UNIFORM, trt.DataType.FLOAT)


def _unreadable(n):
    made = n.trt.add_identity(n.constant(data(2, dtype=BF16)))
    n.kept = n.stored
    n.stored = {}
    return made


def _strict_slice(n):
    return n.trt.add_slice(n.input(data(4), dynamic=True), (0,), (5,), (1,))


def _negative_dynamic_index(n):
    return n.trt.add_gather(n.input(data(4), dynamic=True), n.input(torch.tensor([-1])), 0)


def _squeezed(n):
    return _squeeze_all(n, n.input(data(1, 3), dynamic=True))


def _no_scale(n):
    return n.trt.add_quantize(n.input(data(4)), n.constant(torch.tensor(0.0)), trt.DataType.INT8)


def _zero_point(n):
    layer = n.trt.add_quantize(n.input(data(4)), n.constant(torch.tensor(1.0)), trt.DataType.INT8)
    layer.set_input(2, n.constant(torch.tensor(3, dtype=torch.int8)))
    return layer


def _negative_padding(n):
    layer = n.trt.add_pooling_nd(n.input(data(1, 1, 5, 5)), Pool.MAX, (1, 1))
    return setting(layer, stride_nd=(3, 3), padding_mode=Pad.SAME_UPPER)


def _too_many(n):
    layer = n.trt.add_topk(n.input(data(2, 5), dynamic=True), trt.TopKOperation.MAX, 1, 2)
    layer.set_input(1, n.constant(torch.tensor(6, dtype=torch.int32)))
    return layer


def _scatter_twice(n):
    index = n.input(torch.tensor([[1], [1]]))
    return n.trt.add_scatter(n.input(data(3)), index, n.input(torch.tensor([1.0, 2.0])), Scatter.ND)


def _scatter_beyond(n):
    return n.trt.add_scatter(n.input(data(3)), n.input(torch.tensor([[3]])), n.input(torch.tensor([1.0])), Scatter.ND)


def _divided_by_zero(n):
    return n.op(n.input(torch.tensor([1])), n.input(torch.tensor([0])), Op.DIV)


def _asserted(n):
    size = n.trt.add_shape(n.input(data(2), dynamic=True)).get_output(0)
    n.trt.add_assertion(n.op(size, n.ints(3), Op.EQUAL), "three, please")
    return n.trt.add_identity(n.input(data(1)))


def _cache(n):
    cache, update, at = n.input(data(1, 2, 6, 4)), n.input(data(1, 2, 1, 4)), n.input(torch.tensor([2]).int())
    return n.trt.add_kv_cache_update(cache, update, at, trt.KVCacheMode.LINEAR)


def _endless_concatenation(n):
    loop = _loop(n, n.input(torch.tensor(2)))
    state = loop.add_recurrence(n.input(data(2)))
    state.set_input(1, n.op(state.get_output(0), state.get_output(0), Op.SUM))
    return _collect(loop, state.get_output(0), Output.CONCATENATE, n.constant(torch.tensor(3)))


def _iterates_too_far(n):
    count = n.input(torch.tensor(4))
    loop = _loop(n, count)
    return _collect(loop, loop.add_iterator(n.input(data(3))).get_output(0), Output.CONCATENATE, count)


def _no_limit(n):
    loop = n.trt.add_loop()
    state = loop.add_recurrence(n.input(data(2)))
    state.set_input(1, state.get_output(0))
    return loop.add_loop_output(state.get_output(0), Output.LAST_VALUE)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_mixed_types, "ELEMENTWISE.*no shape"),
        (_random, r"FILL.*RANDOM_UNIFORM has no reference"),
        (_unreadable, "CONSTANT.*weights cannot be read back"),
        (_strict_slice, "SLICE.*elements 0 to 4 of 4"),
        (_negative_dynamic_index, "GATHER.*negative index into a dynamic"),
        (_squeezed, "SQUEEZE.*a dynamic size is 1"),
        (_no_scale, "QUANTIZE.*scales must be positive"),
        (_zero_point, "QUANTIZE.*zero points"),
        (_negative_padding, "POOLING.*SAME_UPPER with a stride of 3"),
        (_too_many, "TOPK.*k=6 of 5"),
        (_scatter_twice, "SCATTER.*several updates"),
        (_scatter_beyond, "SCATTER.*outside of 0 to 2"),
        (_divided_by_zero, "ELEMENTWISE.*int64.*ZeroDivision"),
        (_asserted, "ASSERTION.*three, please"),
        (_cache, "KV_CACHE_UPDATE.*not supported"),
        (_endless_concatenation, "3 long after 2 iterations"),
        (_iterates_too_far, "beyond the 3 elements"),
        (_no_limit, "no trip limit"),
    ],
)
def test_refusals_name_the_layer(build, message):
    net = Net()
    with LOG.capture(), pytest.raises(Torch2RTError, match=message):
        net.evaluate(build(net))


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "inputs are .*x0"),
        ({"x0": data(2, 3), "y": data(1)}, "inputs are"),
        ({"x0": data(2, 3).double()}, "x0.*float64 .*declares torch.float32"),
        ({"x0": data(2, 4)}, r"\[2, 4\].*declares.*\[-1, 3\]"),
        ({"x0": data(3)}, "declares"),
    ],
)
def test_inputs_are_checked(feeds, message):
    net = Net()
    x = net.trt.add_input("x0", trt.DataType.FLOAT, (-1, 3))
    net.trt.mark_output(net.trt.add_identity(x).get_output(0))
    with pytest.raises(InputError, match=message):
        evaluate(net.trt, feeds)


def test_results_are_held_against_the_declaration(monkeypatch):
    from torch2rt.reference import layers as reference_layers

    for wrong in (lambda x: x.half(), lambda x: x[:1]):
        monkeypatch.setitem(reference_layers.LAYERS, "IDENTITY", ("IIdentityLayer", lambda layer, stored, f=wrong: f))
        net = Net()
        with pytest.raises(Torch2RTError, match=r"IDENTITY.*float32 \[2, 3\].*TensorRT declares"):
            net.evaluate(net.trt.add_identity(net.input(data(2, 3))))


def test_an_assertion_in_a_loop_is_checked_in_every_iteration():
    for most, fails in ((5, False), (3, True)):
        net = Net()
        loop = _loop(net, net.constant(torch.tensor(4)))
        state = loop.add_recurrence(net.constant(torch.tensor([0])))
        net.trt.add_assertion(net.op(state.get_output(0), net.ints(most), Op.LESS), "too many")
        state.set_input(1, net.op(state.get_output(0), net.ints(1), Op.SUM))
        made = loop.add_loop_output(state.get_output(0), Output.LAST_VALUE)
        if fails:
            with pytest.raises(Torch2RTError, match="too many"):
                net.evaluate(made)
        else:
            assert net.evaluate(made)[0].tolist() == [4]


def test_layers_that_another_thread_is_looking_at():
    """Python has one object for a layer, whose class says what can be read of it."""
    x = torch.randn(1, 2, 6)
    module = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.MaxPool1d(2)).eval()
    network = lower(trace(module, [x]))
    layers = [network.definition.get_layer(i) for i in range(network.num_layers)]
    before = network.facts()
    for layer in layers:
        layer.__class__ = {"ACTIVATION": trt.IActivationLayer, "POOLING": trt.IPoolingLayer}.get(
            layer.type.name, trt.ILayer
        )
    assert network.facts() == before
    assert torch.equal(ReferenceModule(network)(x), module(x))
