import torch.nn.functional as F

from torch2rt.vocabulary import Context, cast, composite, converter, dtype_of, materialize, torch, trt

Sample, Mode = trt.SampleMode, trt.InterpolationMode


@converter(torch.grid_sampler, torch.grid_sampler_2d, torch.grid_sampler_3d)
def grid_sampler(ctx: Context, input, grid, interpolation_mode, padding_mode, align_corners):
    """In float32, as torch's GPU kernels compute positions: half precision tells at most a thousand pixels apart."""
    x, where = (materialize(ctx, cast(ctx, v, torch.float32)) for v in (input, grid))
    layer = ctx.network.add_grid_sample(x, where)
    layer.interpolation_mode = (Mode.LINEAR, Mode.NEAREST, Mode.CUBIC)[interpolation_mode]
    layer.sample_mode = (Sample.FILL, Sample.CLAMP, Sample.REFLECT)[padding_mode]
    layer.align_corners = align_corners
    return cast(ctx, ctx.track(layer.get_output(0), ctx.out.shape), dtype_of(input))


@composite(F.affine_grid, torch.affine_grid_generator)
def affine_grid(theta, size, align_corners=None):
    """In other torch calls, because torch's own takes all sizes for static.

    Each column of `theta` times the coordinates of the pixels, x first, which is the last dimension. They run from -1
    to 1: the centres of the outermost pixels with `align_corners`, and else their outer edges.
    """
    batch, _, *spatial = size
    n, matrix = len(spatial), theta.float()
    result = matrix[:, :, n].reshape(batch, *[1] * n, n)
    for column, pixels in enumerate(reversed(spatial)):
        whole = torch.sym_max(pixels - 1, 1) if align_corners else pixels
        where = (2 * torch.arange(pixels, device=theta.device) - (pixels - 1)) / whole
        shape = [1] * (n + 2)
        shape[n - column] = pixels
        result = result + matrix[:, :, column].reshape(batch, *[1] * n, n) * where.reshape(shape)
    return result.to(theta.dtype)
