import functools
import math
from fractions import Fraction

import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from torch2rt.vocabulary import (
    Context,
    add,
    cast,
    check,
    composite,
    concat,
    converter,
    dims,
    div,
    dtype_of,
    equal,
    gather,
    iota,
    is_symbolic,
    less,
    logical_and,
    materialize,
    maximum,
    minimum,
    mul,
    ntuple,
    proven,
    reduce,
    reshape,
    same_size,
    select,
    shape_tensor,
    sub,
    torch,
    trt,
    unary,
    weighted_gather,
)

Mode, Coordinate = trt.InterpolationMode, trt.ResizeCoordinateTransformation
_nn, aten = torch._C._nn, torch.ops.aten

# By torch's operator: the interpolation, where pixels are, and how positions between them are rounded.
NEAREST = (Mode.NEAREST, Coordinate.ASYMMETRIC, trt.ResizeRoundMode.FLOOR)
NEAREST_EXACT = (Mode.NEAREST, Coordinate.HALF_PIXEL, trt.ResizeRoundMode.HALF_UP)
LINEAR, CUBIC = (Mode.LINEAR, Coordinate.HALF_PIXEL, None), (Mode.CUBIC, Coordinate.HALF_PIXEL, None)
LAYERS = {
    **{f"upsample_nearest{n}d": NEAREST for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": NEAREST_EXACT for n in (1, 2, 3)},
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"), LINEAR),
    "upsample_bicubic2d": CUBIC,
}
# How far the filters of the others reach, in pixels.
ANTIALIASED = {"_upsample_bilinear2d_aa": 1, "_upsample_bicubic2d_aa": 2, "_upsample_lanczos2d_aa": 3}


def _register(name):
    """The converter of one of the operators that `F.interpolate` calls; `ctx.out` knows the size that is asked for.

    `F.interpolate` gives the scale factors as a list, ATen's operators take them one by one.
    """
    if "nearest" in name:

        @converter(getattr(_nn, name))
        def nearest(
            ctx: Context, input, output_size, *scale_factors, scales=None, scales_d=None, scales_h=None, scales_w=None
        ):
            return _resize(ctx, name, input, scale_factors, (scales_d, scales_h, scales or scales_w))

    else:

        @converter(getattr(_nn, name), limits="floating point only; static sizes for Lanczos")
        def interpolate(
            ctx,
            input,
            output_size,
            align_corners,
            *scale_factors,
            scales=None,
            scales_d=None,
            scales_h=None,
            scales_w=None,
        ):
            dtype = dtype_of(input)
            check(dtype.is_floating_point, f"TensorRT resizes {dtype} only by 'nearest' and 'nearest-exact'")
            return _resize(ctx, name, input, scale_factors, (scales_d, scales_h, scales or scales_w), align_corners)


for _name in (*LAYERS, *ANTIALIASED):
    if hasattr(_nn, _name):  # Lanczos came with torch 2.15
        _register(_name)


@composite(F.interpolate)
def interpolate_by_a_dynamic_factor(
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    """torch's operators take no factors that follow from sizes."""
    sizes = input.shape[2:]
    factors = ntuple(scale_factor, len(sizes))
    if size is not None or not any(map(is_symbolic, factors)):
        return NotImplemented
    size = [torch.sym_int(n * factor) for n, factor in zip(sizes, factors, strict=True)]
    if recompute_scale_factor or mode == "area":
        return F.interpolate(input, size, None, mode, align_corners, antialias=antialias)
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sizes)]
    name = {"nearest-exact": "_upsample_nearest_exact", linear: f"upsample_{mode}"}.get(mode, f"upsample_{mode}")
    name = f"_{name}{len(sizes)}d_aa" if antialias else f"{name}{len(sizes)}d"
    check(name in LAYERS or name in ANTIALIASED, f"{mode=} of {len(sizes)} sizes, {antialias=}")
    return resized(input, size, factors, name, bool(align_corners))


def resized(input, size, factors, name, align_corners):
    """One of torch's operators by its name, for `factors` that may be dynamic: one call that is recorded."""
    if has_torch_function_unary(input):
        return handle_torch_function(resized, (input,), input, size, factors, name, align_corners)
    if not any(map(is_symbolic, (*size, *factors))):  # a graph that runs
        return getattr(_nn, name)(input, None, *([] if "nearest" in name else [align_corners]), list(factors))
    return input.new_empty((*input.shape[:2], *size))


@converter(resized)
def resized_layers(ctx: Context, input, size, factors, name, align_corners):
    return _resize(ctx, name, input, factors, (), align_corners)


def _resize(ctx: Context, name, input, scale_factors, more, align_corners=False):
    """One resize layer where its coordinates, which follow from the sizes, are torch's; else dimension by dimension.

    torch takes coordinates from a scale factor if there is one, whatever size that was rounded to.
    """
    dtype, sizes, out = dtype_of(input), dims(ctx, input)[2:], ctx.out.shape[2:]
    x = input if dtype.is_floating_point else cast(ctx, input, torch.float32)
    scales = [*scale_factors, *more[-len(out) :][len(scale_factors) :]]
    each = list(zip(sizes, out, [s if is_symbolic(s) else s or None for s in scales], strict=True))
    if name in LAYERS and all(_follows_from_sizes(ctx, name, align_corners, *one) for one in each):
        return cast(ctx, _layer(ctx, name, x, align_corners, each), dtype)
    x = x if "nearest" in name else cast(ctx, x, torch.float32)
    for axis, (size, to, scale) in enumerate(each, 2):
        if same_size(size, to) and (scale is None or same_size(scale, 1) or align_corners):
            continue
        if "nearest" in name:
            x = gather(ctx, x, _index(ctx, name, size, to, scale), axis)
        else:
            places, weights = _taps(ctx, name, align_corners, size, to, scale, each)
            x = weighted_gather(ctx, x, places, weights, axis)
    return cast(ctx, x, dtype)


def _layer(ctx: Context, name, x, align_corners, each):
    layer = ctx.network.add_resize(materialize(ctx, x))
    layer.resize_mode, coordinate, rounding = LAYERS[name]
    layer.coordinate_transformation = Coordinate.ALIGN_CORNERS if align_corners else coordinate
    if rounding is not None:
        layer.nearest_rounding = rounding
    times = [_times(ctx, *one) for one in each]
    if None not in times:
        layer.scales = [1.0, 1.0, *map(float, times)]
    elif any(map(is_symbolic, ctx.out.shape)):
        layer.set_input(1, shape_tensor(ctx, ctx.out.shape))
    else:
        layer.shape = tuple(ctx.out.shape)
    return ctx.track(layer.get_output(0), ctx.out.shape)


def _times(ctx: Context, size, out, scale):
    """How many times larger the result is, if that is a whole number for every size."""
    if scale is not None:
        return round(scale) if proven(ctx, out == size * round(scale)) else None
    return next((k for k in range(1, 9) if same_size(out, size * k)), None)


def _follows_from_sizes(ctx: Context, name, align_corners, size, out, scale):
    if align_corners:  # with one pixel, torch takes the first and TensorRT's formula divides by zero
        return same_size(size, out) or proven(ctx, out > 1)
    if is_symbolic(scale):
        return False
    if scale is not None:
        ratio = Fraction(scale).limit_denominator(1000)
        if float(ratio) != scale or not proven(ctx, out * ratio.denominator == size * ratio.numerator):
            return False
    if "nearest" in name and not is_symbolic(size) and not is_symbolic(out):
        half = int(LAYERS[name] is NEAREST_EXACT)
        exact = [(2 * i + half) * size // (2 * out) for i in range(out)]
        return exact == _index(ctx, name, size, out, scale).tolist()  # where rounding decides, TensorRT's may differ
    return True


# One dimension --------------------------------------------------------------------------------------------------------


def _in_torch(name, x, out, scale, *align_corners):
    """torch's own operator on the last size of some planes, in its one-dimensional sense."""
    units = [1] * (next(int(c) for c in name if c.isdigit()) - 1)
    scales = [None if scale is None else s for s in (*map(float, units), scale)]
    return getattr(aten, name).default(x.reshape(*x.shape[:2], *units, -1), [*units, out], *align_corners, *scales)


def _index(ctx: Context, name, size, out, scale):
    """Which element of a dimension each element of the result is."""
    half = 0.5 if "exact" in name else 0.0
    step = size / out if scale is None else 1 / scale
    if not any(map(is_symbolic, (size, out, scale))):
        step = next((1 / times for times in _by_size(ctx, name, scale) if size * times == out), step)
        at = (torch.arange(out, dtype=torch.float32) + half) * torch.tensor(step, dtype=torch.float32)
        return at.long().clamp(max=size - 1)
    for times in _by_size(ctx, name, scale):
        same = equal(ctx, materialize(ctx, size * times), out)
        step = select(ctx, same, 1 / times, step, torch.float32)
    i = cast(ctx, iota(ctx, out), torch.float32)
    at = mul(ctx, add(ctx, i, half) if half else i, step)
    return minimum(ctx, cast(ctx, at, torch.int64), size - 1)


def _by_size(ctx: Context, name, scale):
    """How many times larger the result is where torch's kernel takes no notice of a scale factor."""
    if scale is None or name != "upsample_nearest2d":
        return ()
    return (1, 2) if ctx.device.type == "cpu" else (1,)


def _taps(ctx: Context, name, align_corners, size, out, scale, each):
    """Which elements of a dimension are in each of the result, and how much: what torch makes of the identity."""
    copied = [] if scale is None or align_corners else _copied(ctx, name, (size, out, scale), each)
    if any(map(is_symbolic, (size, out, scale))) or len(copied) > 1 and same_size(size, out):
        return _dynamic_taps(ctx, name, align_corners, size, out, scale, copied)
    matrix = _in_torch(name, torch.eye(size)[None], out, scale, align_corners).reshape(size, out).T
    used = (matrix != 0).int()
    first, last = used.argmax(1, keepdim=True), size - 1 - used.flip(1).argmax(1, keepdim=True)
    places = first + torch.arange(int((last - first).max()) + 1)
    inside, places = places <= last, torch.minimum(places, last)
    return places, matrix.gather(1, places) * inside


def _copied(ctx: Context, name, this, each):
    """The dimensions of which torch copies this one, whatever the scale factor, if all of them keep their sizes."""
    if ctx.device.type == "cpu":
        return [] if LAYERS.get(name) is CUBIC else [this]
    return each if LAYERS.get(name) is LINEAR else []


def _dynamic_taps(ctx: Context, name, align_corners, size, out, scale, copied):
    """`_taps` for sizes that are known when the engine runs."""
    if align_corners:
        step = (size - 1) / torch.sym_max(out - 1, 1)
    else:
        step = size / out if scale is None else 1 / scale
    step = materialize(ctx, step, torch.float32)
    same = [equal(ctx, materialize(ctx, a), b) for a, b, _ in copied]
    if same:
        same = functools.reduce(lambda a, b: logical_and(ctx, a, b), same)
        step = select(ctx, same, 1.0, step, torch.float32)
    i = reshape(ctx, cast(ctx, iota(ctx, out), torch.float32), (out, 1))
    if name in ANTIALIASED:
        return _filter_taps(ctx, name, i, step, size, out, scale)
    if align_corners:
        at = mul(ctx, i, step)
    else:
        at = sub(ctx, mul(ctx, add(ctx, i, 0.5), step), 0.5)
    if LAYERS[name] is CUBIC:
        return _cubic_taps(ctx, at, size)
    at = maximum(ctx, at, 0.0)
    at = minimum(ctx, at, size - 1, torch.float32)
    low = unary(ctx, trt.UnaryOperation.FLOOR, at)
    share = sub(ctx, at, low)
    low = cast(ctx, low, torch.int64)
    high = minimum(ctx, add(ctx, low, 1), size - 1)
    return concat(ctx, [low, high], 1), concat(ctx, [sub(ctx, 1.0, share), share], 1)


def _cubic_taps(ctx: Context, at, size):
    """The four neighbours of each position; beyond an edge its element counts again."""
    low = unary(ctx, trt.UnaryOperation.FLOOR, at)
    neighbours = torch.arange(-1, 3)
    distance = sub(ctx, sub(ctx, at, low), neighbours.float())
    places = add(ctx, cast(ctx, low, torch.int64), neighbours)
    places = maximum(ctx, minimum(ctx, places, size - 1), 0)
    return places, _cubic(ctx, unary(ctx, trt.UnaryOperation.ABS, distance), -0.75)


def _cubic(ctx: Context, x, a):
    """Keys' cubic convolution at distances of up to 2 pixels; beyond, it is 0."""
    near, far = [a + 2, -(a + 3), 0.0, 1.0], [a, -5 * a, 8 * a, -4 * a]
    near, far = _polynomial(ctx, x, near), _polynomial(ctx, x, far)
    far = select(ctx, less(ctx, x, 2.0), far, 0.0, torch.float32)
    return select(ctx, less(ctx, x, 1.0), near, far, torch.float32)


def _polynomial(ctx: Context, x, coefficients):
    result, *others = coefficients
    for coefficient in others:
        result = add(ctx, mul(ctx, x, result), coefficient)
    return result


def _filter_taps(ctx: Context, name, i, step, size, out, scale):
    """All elements under a filter that is as much wider as the result is smaller, and its values there, of sum 1."""
    check("lanczos" not in name, "sizes must be static with Lanczos")
    reach = ANTIALIASED[name]
    wider = maximum(ctx, step, 1.0)
    center = mul(ctx, add(ctx, i, 0.5), step)
    support = mul(ctx, wider, float(reach))
    whole = lambda x: cast(ctx, add(ctx, x, 0.5), torch.int64)  # noqa: E731
    first = maximum(ctx, whole(sub(ctx, center, support)), 0)
    end = minimum(ctx, whole(add(ctx, center, support)), size)
    if scale is None:
        longest = 2 * reach * torch.sym_max((size + out - 1) // out, 1) + 1
    else:
        longest = 2 * reach * torch.sym_max(torch.sym_int(math.ceil(1 / scale)), 1) + 1
    places = add(ctx, first, iota(ctx, longest))
    x = sub(ctx, add(ctx, cast(ctx, places, torch.float32), 0.5), center)
    x = unary(ctx, trt.UnaryOperation.ABS, div(ctx, x, wider))
    if reach == 1:
        weight = maximum(ctx, sub(ctx, 1.0, x), 0.0)
    else:
        weight = _cubic(ctx, x, -0.5)
    weight = select(ctx, less(ctx, places, end), weight, 0.0, torch.float32)
    total = reduce(ctx, trt.ReduceOperation.SUM, weight, 1, keepdim=True)
    return minimum(ctx, places, size - 1), div(ctx, weight, total)
