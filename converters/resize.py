from fractions import Fraction

from torch2rt.vocabulary import (
    cast,
    check,
    concat,
    converter,
    dims,
    dtype_of,
    elementwise,
    gather,
    iota,
    is_symbolic,
    proven,
    reshape,
    same_size,
    shape_tensor,
    torch,
    trt,
    unary,
    weighted_gather,
)

EW, Mode, Coordinate = trt.ElementWiseOperation, trt.InterpolationMode, trt.ResizeCoordinateTransformation
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
DYNAMIC = (
    "sizes must be static with antialias, and with bicubic for a scale factor that they do not follow exactly, or for "
    "align_corners and a result that may be a single pixel"
)
ANTIALIASED = ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa")


def _register(name):
    """The converter of one of the operators that `F.interpolate` calls; `ctx.out` knows the size that is asked for.

    `F.interpolate` gives the scale factors as a list, ATen's operators take them one by one.
    """
    if "nearest" in name:

        @converter(getattr(_nn, name))
        def nearest(ctx, input, output_size, *scale_factors, scales=None, scales_d=None, scales_h=None, scales_w=None):
            return _resize(ctx, name, input, scale_factors, (scales_d, scales_h, scales or scales_w))

    else:

        @converter(getattr(_nn, name), limits="floating point only; static sizes for antialias and some of bicubic")
        def interpolate(
            ctx, input, output_size, align_corners, *scale_factors, scales=None, scales_d=None, scales_h=None,
            scales_w=None,
        ):  # fmt: skip
            dtype = dtype_of(input)
            check(dtype.is_floating_point, f"TensorRT resizes {dtype} only by 'nearest' and 'nearest-exact'")
            return _resize(ctx, name, input, scale_factors, (scales_d, scales_h, scales or scales_w), align_corners)


for _name in (*LAYERS, *ANTIALIASED):
    if hasattr(_nn, _name):  # Lanczos came with torch 2.15
        _register(_name)


def _resize(ctx, name, input, scale_factors, more, align_corners=False):
    """One resize layer where its coordinates, which follow from the sizes, are torch's; else dimension by dimension.

    torch takes coordinates from a scale factor if there is one, whatever size that was rounded to.
    """
    dtype, sizes, out = dtype_of(input), dims(ctx, input)[2:], ctx.out.shape[2:]
    x = input if dtype.is_floating_point else cast(ctx, input, torch.float32)
    scales = [*scale_factors, *more[-len(out) :][len(scale_factors) :]]
    each = list(zip(sizes, out, [s or None for s in scales], strict=True))
    if name in LAYERS and all(_follows_from_sizes(ctx, name, align_corners, *one) for one in each):
        return cast(ctx, _layer(ctx, name, x, align_corners, each), dtype)
    x = x if "nearest" in name else cast(ctx, x, torch.float32)
    for axis, (size, to, scale) in enumerate(each, 2):
        if same_size(size, to) and (scale is None or scale == 1 or align_corners):
            continue
        if "nearest" in name:
            x = gather(ctx, x, _index(ctx, name, size, to, scale), axis)
        else:
            x = weighted_gather(ctx, x, *_taps(ctx, name, align_corners, size, to, scale), axis)
    return cast(ctx, x, dtype)


def _layer(ctx, name, x, align_corners, each):
    layer = ctx.network.add_resize(x)
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


def _times(ctx, size, out, scale):
    """How many times larger the result is, if that is a whole number for every size."""
    if scale is not None:
        return round(scale) if proven(ctx, out == size * round(scale)) else None
    return next((k for k in range(1, 9) if same_size(out, size * k)), None)


def _follows_from_sizes(ctx, name, align_corners, size, out, scale):
    if align_corners:  # with one pixel, torch takes the first and TensorRT's formula divides by zero
        return same_size(size, out) or proven(ctx, out > 1)
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


def _index(ctx, name, size, out, scale):
    """Which element of a dimension each element of the result is: what torch makes of 0, 1, 2, ..."""
    if not is_symbolic(size) and not is_symbolic(out):
        return _in_torch(name, torch.arange(size, dtype=torch.float32)[None, None], out, scale).reshape(out).long()
    i = cast(ctx, iota(ctx, out), torch.float32)
    i = elementwise(ctx, EW.SUM, i, 0.5) if "exact" in name else i
    at = elementwise(ctx, EW.PROD, i, size / out if scale is None else 1 / scale)
    return elementwise(ctx, EW.MIN, cast(ctx, at, torch.int64), size - 1)


def _taps(ctx, name, align_corners, size, out, scale):
    """Which elements of a dimension are in each of the result, and how much: what torch makes of the identity."""
    if is_symbolic(size) or is_symbolic(out):
        check(LAYERS.get(name) is LINEAR, DYNAMIC)
        return _linear_taps(ctx, align_corners, size, out, scale)
    matrix = _in_torch(name, torch.eye(size)[None], out, scale, align_corners).reshape(size, out).T
    used = (matrix != 0).int()
    first, last = used.argmax(1, keepdim=True), size - 1 - used.flip(1).argmax(1, keepdim=True)
    places = first + torch.arange(int((last - first).max()) + 1)
    inside, places = places <= last, torch.minimum(places, last)
    return places, matrix.gather(1, places) * inside


def _linear_taps(ctx, align_corners, size, out, scale):
    """The two neighbours of each position, for sizes that are known when the engine runs."""
    at = cast(ctx, iota(ctx, out), torch.float32)
    if align_corners:
        at = elementwise(ctx, EW.PROD, at, (size - 1) / torch.sym_max(out - 1, 1))
    else:
        at = elementwise(ctx, EW.PROD, elementwise(ctx, EW.SUM, at, 0.5), size / out if scale is None else 1 / scale)
        at = elementwise(ctx, EW.MAX, elementwise(ctx, EW.SUB, at, 0.5), 0.0)
    at = reshape(ctx, elementwise(ctx, EW.MIN, at, size - 1, torch.float32), (out, 1))
    low = unary(ctx, trt.UnaryOperation.FLOOR, at)
    share = elementwise(ctx, EW.SUB, at, low)
    low = cast(ctx, low, torch.int64)
    high = elementwise(ctx, EW.MIN, elementwise(ctx, EW.SUM, low, 1), size - 1)
    return concat(ctx, [low, high], 1), concat(ctx, [elementwise(ctx, EW.SUB, 1.0, share), share], 1)
