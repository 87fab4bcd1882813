"""torchvision's operators, as the calls of torch that their kernels amount to.

Where boxes are sampled between pixels, that is in float32, as it is in torchvision under autocast: in half precision,
positions of more than a thousand pixels have no fractions.
"""

import functools

import torch.nn.functional as F
import torchvision  # noqa: F401  (loads torch.ops.torchvision)

from torch2rt.vocabulary import check, composite, is_traced, refuse, torch

ADAPTIVE = (
    "sampling_ratio <= 0 takes as many samples as a box is large, which only constant boxes tell beforehand. Give the "
    "samples of a bin, such as sampling_ratio=2"
)


def operator(name):
    """A torchvision operator in both ways to call it; nothing where this torchvision has none of the name."""
    packet = getattr(torch.ops.torchvision, name, None)
    return (packet, packet.default) if packet else ()


# Samples between pixels ----------------------------------------------------------------------------------------------


@composite(*operator("roi_align"))
def roi_align(input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    corners = rois[:, 1:].float() * spatial_scale - (0.5 if aligned else 0.0)
    sizes = corners[:, 2:] - corners[:, :2]
    sizes = sizes if aligned else sizes.clamp(min=1.0)
    image = rois[:, 0].int().reshape(-1, 1, 1)
    images = input.permute(0, 2, 3, 1)
    return bin_means(images, image, corners, sizes, (pooled_height, pooled_width), sampling_ratio).to(input.dtype)


@composite(*operator("ps_roi_align"))
def ps_roi_align(input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio):
    """Every bin has channels of its own, which make an image of their own."""
    corners = rois[:, 1:].float() * spatial_scale - 0.5
    sizes = corners[:, 2:] - corners[:, :2]
    empty = sampling_ratio <= 0 and not is_traced(sizes) and bool((sizes <= 0).any())
    check(not empty, f"with {sampling_ratio=}, torchvision makes NaN of boxes without an area")
    bins = (pooled_height, pooled_width)
    images = input.unflatten(1, (-1, pooled_height * pooled_width)).permute(0, 2, 3, 4, 1).flatten(0, 1)
    image = torch.arange(pooled_height * pooled_width, dtype=torch.int32, device=input.device).reshape(bins)
    image = image + rois[:, 0].int().reshape(-1, 1, 1) * (pooled_height * pooled_width)
    result = bin_means(images, image, corners, sizes, bins, sampling_ratio).to(input.dtype)
    return result, channels_of(result)


def channels_of(result):
    """The channel that each bin of a position-sensitive pooling looks at."""
    channels = torch.arange(result[0].numel(), dtype=torch.int32, device=result.device)
    return channels.reshape(result.shape[1:]).expand(result.shape)


def bin_means(images, image, corners, sizes, bins, ratio):
    """The mean of each bin's samples: (boxes, channels, *bins).

    `images` is (images, height, width, channels), and `image` tells which of them a box or a bin looks at.
    """
    y = within(corners[:, 1:2], sizes[:, 1:], bins[0], ratio, images.shape[1])
    x = within(corners[:, :1], sizes[:, :1], bins[1], ratio, images.shape[2])
    y = [(pixel[:, :, None, :, None], share[:, :, None, :, None]) for pixel, share in y]
    x = [(pixel[:, None, :, None], share[:, None, :, None]) for pixel, share in x]
    return between(images, image[..., None, None], y, x).flatten(3, 4).sum(3).permute(0, 3, 1, 2)


def between(images, image, y, x):
    """What lies between pixels, as the sum of its neighbours' shares of it, with the channels behind its sizes."""
    count, height, width, channels = images.shape
    pixels = images.reshape(count * height * width, channels)
    parts = [
        F.embedding((image * height + row) * width + column, pixels).float() * (above * left).unsqueeze(-1)
        for row, above in y
        for column, left in x
    ]
    return sum(parts[1:], parts[0])


def within(start, size, bins, ratio, limit):
    """Along one axis the neighbours of each bin's samples and their shares of its mean, both (boxes, bins, samples).

    A sample more than a pixel outside the image is 0, and a nearer one is the pixel at the edge.
    """
    check(ratio > 0 or not is_traced(size), ADAPTIVE)
    bin_size = size.unsqueeze(2) / bins
    samples = ratio if ratio > 0 else bin_size.ceil()
    most = ratio if ratio > 0 else max(1, *samples.int().flatten().tolist())
    bin_index, steps = (torch.arange(n, device=size.device) for n in (bins, most))
    where = start.unsqueeze(2) + bin_index.unsqueeze(1) * bin_size + (steps + 0.5) * bin_size / samples
    inside = where.clamp(-1, limit) == where
    if ratio <= 0:
        inside = inside & (steps < samples)
    where, share = torch.where(inside, where, 0.0).clamp(0, limit - 1), torch.where(inside, 1 / samples, 0.0)
    low = where.floor()
    return [(low.int(), (low + 1 - where) * share), ((low.int() + 1).clamp(max=limit - 1), (where - low) * share)]


@composite(*operator("deform_conv2d"))
def deform_conv2d(
    input,
    weight,
    offset,
    mask,
    bias,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    groups,
    offset_groups,
    use_mask,
):
    """One sample for each element of the kernel, and a product of matrices."""
    batch, channels, height, width = input.shape
    kernel_h, kernel_w = weight.shape[2:]
    out_h, out_w = offset.shape[2:]
    row, column, element = (torch.arange(n, device=input.device) for n in (out_h, out_w, kernel_h * kernel_w))
    element, row = element.reshape(-1, 1, 1), row.unsqueeze(1)
    offset = offset.float().unflatten(1, (offset_groups, kernel_h * kernel_w, 2))
    y = around(element // kernel_w * dilation_h + (row * stride_h - pad_h) + offset[:, :, :, 0], height)
    x = around(element % kernel_w * dilation_w + (column * stride_w - pad_w) + offset[:, :, :, 1], width)
    if use_mask:
        mask = mask.float().unflatten(1, (offset_groups, -1))
        y = [(pixel, share * mask) for pixel, share in y]
    images = input.unflatten(1, (offset_groups, -1)).permute(0, 1, 3, 4, 2).flatten(0, 1)
    image = torch.arange(batch * offset_groups, dtype=torch.int32, device=input.device)
    samples = between(images, image.reshape(batch, offset_groups, 1, 1, 1), y, x)
    samples = samples.permute(0, 3, 4, 2, 1, 5).reshape(batch, out_h * out_w, -1, groups, channels // groups)
    samples = samples.permute(0, 3, 1, 2, 4).flatten(3).to(weight.dtype)
    weight = weight.unflatten(0, (groups, -1)).flatten(3).transpose(2, 3).flatten(2)
    with torch.autocast(input.device.type, enabled=False):
        result = weight @ samples.transpose(2, 3)
    return (result.reshape(batch, -1, out_h, out_w) + bias.reshape(-1, 1, 1)).to(input.dtype)


def around(where, limit):
    """Along one axis the pixels before and after each position and their shares of it, none outside the image."""
    low = where.floor()
    inside = [(pixel, pixel.clamp(0, limit - 1)) for pixel in (low, low + 1)]
    return [(nearest.int(), torch.where(nearest == pixel, 1 - (where - pixel).abs(), 0.0)) for pixel, nearest in inside]


# Windows of whole pixels ---------------------------------------------------------------------------------------------


@composite(*operator("roi_pool"))
def roi_pool(input, rois, spatial_scale, pooled_height, pooled_width):
    """The largest of four rectangles that overlap, of sizes that are powers of two, whose maxima are in a table."""
    _, argmax = torch.ops.torchvision.roi_pool(input, rois, spatial_scale, pooled_height, pooled_width)
    batch, channels, height, width = input.shape
    check(not is_traced(height) and not is_traced(width), "images of a dynamic height or width are not supported")
    corners = rounded(rois[:, 1:] * spatial_scale)
    sizes = (corners[:, 2:] - corners[:, :2] + 1).clamp(min=1).to(input.dtype)
    first_y, after_y = windows(corners[:, 1:2], sizes[:, 1:], pooled_height, height)
    first_x, after_x = windows(corners[:, :1], sizes[:, :1], pooled_width, width)
    level_y, y = halves(first_y, after_y, height)
    level_x, x = halves(first_x, after_x, width)
    table = maxima(maxima(input.permute(0, 2, 3, 1), 1), 3)
    image = (level_x.unsqueeze(1) * table.shape[1] + level_y.unsqueeze(2)) * batch + rois[:, 0].int().reshape(-1, 1, 1)
    pixels = table.reshape(-1, channels)
    places = [(image * height + row.unsqueeze(2)) * width + column.unsqueeze(1) for row in y for column in x]
    largest = functools.reduce(torch.maximum, [F.embedding(place, pixels) for place in places])
    full = (after_y > first_y).unsqueeze(2) & (after_x > first_x).unsqueeze(1)
    return torch.where(full.unsqueeze(3), largest, 0.0).permute(0, 3, 1, 2), argmax


def maxima(images, dim):
    """For each power of two that fits, the largest of so many pixels, counted from each of them along one axis."""
    levels = [images]
    while 2 ** len(levels) <= images.shape[dim]:
        levels.append(torch.maximum(levels[-1], levels[-1].roll(-(2 ** (len(levels) - 1)), dim)))
    return torch.stack(levels)


def halves(first, after, limit):
    """The power of two of which each window takes two, and where they begin."""
    power = torch.tensor([max(size, 1).bit_length() - 1 for size in range(limit + 1)], dtype=torch.int32)
    power = torch.stack([power, 2**power], 1).to(first.device)
    power, size = F.embedding((after - first).clamp(min=0), power).unbind(2)
    return power, [first.clamp(max=limit - 1), (after - size).clamp(min=0)]


@composite(*operator("ps_roi_pool"))
def ps_roi_pool(input, rois, spatial_scale, pooled_height, pooled_width):
    """A product of matrices, which say of each pixel whether it is in a window. The last row and column are in none."""
    batch, _, height, width = input.shape
    corners = rounded(rois[:, 1:] * spatial_scale)
    sizes = (corners[:, 2:] - corners[:, :2]).clamp(min=1).to(input.dtype)
    first_y, after_y = windows(corners[:, 1:2], sizes[:, 1:], pooled_height, height - 1)
    first_x, after_x = windows(corners[:, :1], sizes[:, :1], pooled_width, width - 1)
    image, row, column = (torch.arange(n, dtype=torch.int32, device=input.device) for n in (batch, height, width))
    in_image = (rois[:, :1].int() == image).reshape(-1, 1, batch, 1)
    in_y = (row >= first_y.unsqueeze(2)) & (row < after_y.unsqueeze(2))
    in_x = (column >= first_x.unsqueeze(2)) & (column < after_x.unsqueeze(2))
    in_y = (in_image & in_y.unsqueeze(2)).transpose(0, 1)[:, None, ..., None]
    inside = (in_y & in_x.transpose(0, 1)[:, :, None, None]).flatten(3).float()
    images = input.float().unflatten(1, (-1, pooled_height, pooled_width)).permute(2, 3, 0, 4, 5, 1).flatten(2, 4)
    with torch.autocast(input.device.type, enabled=False):
        sums = (inside @ images).permute(2, 3, 0, 1)
    area = ((after_y - first_y).clamp(min=0).unsqueeze(2) * (after_x - first_x).clamp(min=0).unsqueeze(1)).unsqueeze(1)
    result = torch.where(area > 0, sums / area, 0.0).to(input.dtype)
    return result, channels_of(result)


def rounded(x):
    """The nearest integer, and away from zero halfway between two, where `torch.round` takes the even one."""
    whole = x.trunc()
    return (whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0.0)).int()


def windows(start, size, bins, limit):
    """Along one axis the first pixel of each bin and the one after its last: (boxes, bins).

    The `where` is always `bins`, but not a constant: of `size / 7 * 3`, TensorRT for RTX 1.6 makes one product, and
    rounds quotients to other integers.
    """
    bin_size = size / torch.where(size > 0, bins, size)
    edges = torch.arange(bins + 1, dtype=size.dtype, device=size.device)
    first, after = (edges[:-1] * bin_size).floor().int(), (edges[1:] * bin_size).ceil().int()
    return (first + start).clamp(0, limit), (after + start).clamp(0, limit)


# Refused -------------------------------------------------------------------------------------------------------------


@composite(*operator("nms"))
def nms(dets, scores, iou_threshold):
    refuse(
        "how many boxes are kept depends on their values, and TensorRT for RTX has no layer for it. Return all boxes "
        "and scores from the module, and call torchvision.ops.nms or batched_nms on what the engine returns"
    )


@composite(*operator("box_iou_rotated"))
def box_iou_rotated(boxes1, boxes2):
    refuse(
        "the polygon in which two rotated boxes overlap has as many corners as their values say. Return the boxes, and "
        "call torchvision.ops.box_iou on what the engine returns"
    )
