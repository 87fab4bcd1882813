"""Fourier transforms, of which TensorRT has none, as products with matrices of cosines and sines.

torch makes all of `torch.fft` of three operators: from real to complex numbers, back, and between complex ones.
"""

import functools
import math

import torch.nn.functional as F

from torch2rt.vocabulary import (
    Complex,
    Context,
    cast,
    check,
    complex_converter,
    composite,
    concat,
    dims,
    div,
    equal,
    expression,
    floor_div,
    iota,
    is_symbolic,
    is_traced,
    logical_or,
    materialize,
    matmul,
    mul,
    narrow,
    permute,
    proven,
    reshape,
    select,
    slice_nd,
    sub,
    torch,
    trt,
    unary,
    wrap_dim,
)
from torch2rt.vocabulary.complex import from_polar, minus, negative, parts, product, times

Unary = trt.UnaryOperation
aten = torch.ops.aten

LARGE, LARGEST = 2048, 4096  # rows of a matrix of waves: from where two smaller ones do the work, and at most


def waves(ctx: Context, n, rows, columns, sign, factor=1.0, halves=False):
    """The cosine and sine of j * k turns of 2 pi / n; with `halves`, row k stands for row n - k too.

    Turns are counted as integers, so that whole ones drop out exactly.
    """
    key = ("waves", *map(expression, (n, rows, columns)), sign, factor, halves)
    if key not in ctx.memo and is_symbolic(n):
        ctx.memo[key] = dynamic_waves(ctx, n, rows, columns, sign, halves)
    if key not in ctx.memo:
        row = torch.arange(rows)[:, None]
        angle = (row * torch.arange(columns) % n).double() * (2 * math.pi / n)
        scale = torch.where((row == 0) | (2 * row == n), factor, 2 * factor) if halves else factor
        ctx.memo[key] = [(wave * scale).float() for wave in (angle.cos(), sign * angle.sin())]
    return ctx.memo[key]


def dynamic_waves(ctx: Context, n, rows, columns, sign, halves):
    check(proven(ctx, n <= LARGEST), f"a transform of dynamic length has at most {LARGEST} elements")
    row, column = reshape(ctx, iota(ctx, rows), [rows, 1]), iota(ctx, columns)
    turns = mul(ctx, row, column)
    whole = mul(ctx, floor_div(ctx, turns, n), n)
    part = div(ctx, sub(ctx, turns, whole), n, torch.float32)
    result = from_polar(ctx, 1, mul(ctx, part, 2 * math.pi))
    if halves:
        single = [equal(ctx, row, 0), equal(ctx, mul(ctx, row, 2), n)]
        weight = select(ctx, logical_or(ctx, *single), 1.0, 2.0)
        result = [times(ctx, wave, weight) for wave in result]
    return [result[0], result[1] if sign > 0 else negative(ctx, result[1])]


def along(ctx: Context, x, matrix, dim):
    """A real tensor times a matrix along one dimension."""
    ndim = len(dims(ctx, x))
    if dim == ndim - 2:
        return matmul(ctx, matrix, x, transpose_a=True)
    x = matmul(ctx, swapped(ctx, x, dim), matrix)
    return swapped(ctx, x, dim) if ndim > 1 else reshape(ctx, x, dims(ctx, x)[1:])


def swapped(ctx: Context, x, dim, other=-1):
    order = list(range(len(dims(ctx, x))))
    order[dim], order[other] = order[other], order[dim]
    return permute(ctx, x, order)


def both(function, x):
    return [None if v is None else function(v) for v in x]


def transform(ctx: Context, x, dim, sign, factor=1.0, columns=None):
    """A pair of parts as waves along one dimension, up to those of frequency `columns`."""
    n = dims(ctx, x[0])[dim]
    columns = n if columns is None else columns
    if not is_symbolic(n) and n > LARGE:
        first = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
        if first > 1 and n // first <= LARGEST:
            whole = in_two(ctx, x, dim, sign, factor, first, n // first)
            return whole if columns == n else both(lambda v: narrow(ctx, v, dim, 0, columns), whole)
        check(n <= LARGEST, f"a transform of {n} elements needs a matrix of {n // first} rows; {LARGEST} are supported")
    pair = waves(ctx, n, n, columns, sign, factor)
    return product(ctx, x, pair, lambda ctx, v, wave: along(ctx, v, wave, dim))


def in_two(ctx: Context, x, dim, sign, factor, m, n):
    """A transform of m * n elements by m of them n apart, then n of these (Cooley and Tukey)."""
    x = both(lambda v: swapped(ctx, v, dim), x)
    *rest, _ = dims(ctx, x[0])
    x = both(lambda v: reshape(ctx, v, [*rest, m, n]), x)
    x = transform(ctx, x, len(rest), sign)
    x = product(ctx, x, waves(ctx, m * n, m, n, sign, factor))
    x = transform(ctx, x, len(rest) + 1, sign)
    return both(lambda v: swapped(ctx, reshape(ctx, swapped(ctx, v, -2), [*rest, m * n]), dim), x)


def to_real(ctx: Context, x, dim, n, factor):
    """The real signal of the first half of a spectrum, which says all about the second."""
    half = n // 2 + 1
    if not is_symbolic(n) and n > LARGE:
        mirrored = [n - half if d == dim else 0 for d in range(len(dims(ctx, x[0])))]
        size = [n - half if d == dim else size for d, size in enumerate(dims(ctx, x[0]))]
        stride = [-1 if d == dim else 1 for d in range(len(size))]
        second = both(lambda v: slice_nd(ctx, v, mirrored, size, stride), x)
        whole = [concat(ctx, pair, dim) for pair in ((x[0], second[0]), (x[1], negative(ctx, second[1])))]
        return transform(ctx, whole, dim, 1, factor)[0]
    cosine, sine = waves(ctx, n, half, n, 1, factor, halves=True)
    return minus(ctx, along(ctx, x[0], cosine, dim), along(ctx, x[1], sine, dim))


def normal(ctx: Context, sizes, normalization):
    """What torch divides by: 1, the root of the number of elements, or that number; 1.0 where it is dynamic."""
    count = math.prod(sizes)
    return 1.0 if is_symbolic(count) else [1.0, count**-0.5, 1 / count][normalization]


def normalized(ctx: Context, x, sizes, normalization):
    """A dynamic factor that `normal` left out."""
    count = math.prod(sizes)
    if not is_symbolic(count) or not normalization:
        return x
    count = materialize(ctx, count, torch.float32)
    return div(ctx, x, unary(ctx, Unary.SQRT, count) if normalization == 1 else count)


@complex_converter(aten._fft_r2c)
def fft_r2c(ctx: Context, input, dim, normalization, onesided):
    x = cast(ctx, input, torch.float32), None
    return spectrum(ctx, x, dim, normalization, -1, dims(ctx, input)[dim[-1]] // 2 + 1 if onesided else None)


@complex_converter(aten._fft_c2c)
def fft_c2c(ctx: Context, input, dim, normalization, forward):
    return spectrum(ctx, parts(ctx, input), dim, normalization, -1 if forward else 1)


def spectrum(ctx: Context, x, dim, normalization, sign, columns=None):
    sizes = [dims(ctx, x[0])[d] for d in dim]
    factor = normal(ctx, sizes, normalization)
    for d in reversed(dim):
        x = transform(ctx, x, wrap_dim(d, len(ctx.out.shape)), sign, factor, columns)
        factor, columns = 1.0, None
    return Complex(*(normalized(ctx, v, sizes, normalization) for v in x))


@complex_converter(aten._fft_c2r)
def fft_c2r(ctx: Context, input, dim, normalization, last_dim_size):
    *others, last = [wrap_dim(d, len(ctx.out.shape)) for d in dim]
    sizes = [ctx.out.shape[d] for d in dim]
    x = parts(ctx, input)
    for d in others:
        x = transform(ctx, x, d, 1)
    x = to_real(ctx, x, last, last_dim_size, normal(ctx, sizes, normalization))
    return normalized(ctx, x, sizes, normalization)


# Spectra of short times ----------------------------------------------------------------------------------------------


@composite(torch._VF.stft)
def stft(
    input,
    n_fft,
    hop_length=None,
    win_length=None,
    window=None,
    normalized=False,
    onesided=None,
    return_complex=None,
    align_to_window=None,
):
    """Frames, each with the window on it, and their transforms. `torch.stft` has padded already."""
    check(not align_to_window, "align_to_window=True is not supported")
    x = input.unfold(-1, n_fft, n_fft // 4 if hop_length is None else hop_length)
    x = x if window is None and win_length is None else x * laid_out(input, window, win_length, n_fft)
    onesided = not x.is_complex() if onesided is None else onesided
    x = (torch.fft.rfft if onesided else torch.fft.fft)(x, norm="ortho" if normalized else "backward")
    x = x.transpose(-1, -2)
    return x if return_complex else torch.view_as_real(x)


@composite(torch.istft)
def istft(
    input,
    n_fft,
    hop_length=None,
    win_length=None,
    window=None,
    center=True,
    normalized=False,
    onesided=None,
    length=None,
    return_complex=False,
):
    """Signals of the frames, each with the window on it, added up and divided by the sum of the windows' squares."""
    *_, size, frames = input.shape
    onesided = size != n_fft if onesided is None else onesided
    check(input.is_complex() and size == (n_fft // 2 + 1 if onesided else n_fft), "its input is no such spectrum")
    check(not (onesided and return_complex), "return_complex=True needs onesided=False")
    norm, x = "ortho" if normalized else "backward", input.transpose(-1, -2)
    x = torch.fft.ifft(x, norm=norm) if return_complex else torch.fft.irfft(x[..., : n_fft // 2 + 1], n_fft, norm=norm)
    hop, window = n_fft // 4 if hop_length is None else hop_length, laid_out(x, window, win_length, n_fft)
    check(not window.is_complex(), "a complex window is not supported")
    result, weight = overlapped(x * window, hop), overlapped((window * window).expand(frames, n_fft), hop)
    start = n_fft // 2 if center else 0
    end = n_fft + hop * (frames - 1) - start if length is None else start + length
    cut = (-start, end - weight.shape[-1])
    weight = F.pad(weight, cut, value=1.0)
    check(is_traced(weight) or bool((weight > 1e-11).all()), "the windows leave a gap")
    return F.pad(result, cut) / weight


def laid_out(like, window, win_length, n_fft):
    """The window in the middle of a frame."""
    length = n_fft if win_length is None else win_length
    window = torch.ones(length, device=like.device) if window is None else window
    check(0 < length <= n_fft and tuple(window.shape) == (length,), f"the window is not of {length} elements")
    left = (n_fft - length) // 2
    return F.pad(window, (left, n_fft - length - left))


def overlapped(frames, hop):
    """Frames that begin `hop` apart, added up."""
    *batch, count, size = frames.shape
    n = -(-size // hop)
    pieces = F.pad(frames, (0, n * hop - size)).reshape(*batch, count, n, hop).unbind(-2)
    pieces = [F.pad(piece, (0, 0, i, n - 1 - i)) for i, piece in enumerate(pieces)]
    total = functools.reduce(torch.add, pieces).reshape(*batch, (count + n - 1) * hop)
    return total if n * hop == size else F.pad(total, (0, size - n * hop))


@composite(torch.fft.fftfreq)
def fftfreq(n, d=1.0, **kwargs):
    """torch takes numbers only, and would fix a dynamic one."""
    if not is_symbolic(n):
        return NotImplemented
    i = torch.arange(n, **kwargs)
    return torch.where(i < (n + 1) // 2, i, i - n) / (n * d)


@composite(torch.fft.rfftfreq)
def rfftfreq(n, d=1.0, **kwargs):
    return torch.arange(n // 2 + 1, **kwargs) / (n * d) if is_symbolic(n) else NotImplemented
