"""group_norm_silu: GroupNorm, SiLU, the time embedding's shift and dropout over NHWC, forward.

    h = x + shift                                    n = (h - mean) * rstd   over each group of an image
    b = n * weight + bias                            y = dropout(b * sigmoid(b))

Layout and division of the work: see `group_norm_tiles`. Arithmetic and statistics are float32. Kept for the backward
pass: mean and rstd [N, G] float32; dropout is made again from its address.
Bytes moved, of 2 or 4 per element: 2 elements' worth (one tile, loop) or 3 (split).

Statistics are sums around a pivot, the mean of the program's first tile. That tile is a fraction f of the slice, so
variance >= f * (pivot - mean)^2, and the subtraction at the end loses at most log2(1 + 1/f) bits; with one tile it
is the corrected two-pass formula. No atomics, every order fixed: two runs agree bit for bit. Not yet timed on a GPU.

Shapes: N image, C channel, H x W pixels, G group, D = C / G channels per group, S slice of pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.constants import GROUP_NORM_EPS
from ddpm_fast.kernels import checks
from ddpm_fast.kernels.group_norm_tiles import (
    by_channel,
    by_group,
    channel_block,
    check_inputs,
    divide,
    drop,
    dropout_arguments,
    load_affine,
    load_shift,
    load_tile,
    locate,
    shift_arguments,
    store_tile,
)


@triton.jit
def slice_moments(
    base, area, shift, place,
    C: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Return x + shift - pivot of the slice's first tile, its mask, and pivot, mean - pivot and M2 [BLOCK_G]."""
    pixels = area[0]
    x, mask = load_tile(base, 0, area, C, BLOCK_P, "evict_last")
    first = tl.where(mask, x + shift[None, :], 0.0)
    pivot = by_group(tl.sum(first, axis=0), place, BLOCK_G) / (tl.minimum(pixels, BLOCK_P) * (1.0 * D))
    pivot_c = by_channel(pivot, place)
    first = tl.where(mask, first - pivot_c[None, :], 0.0)
    total, squares = first, first * first
    if not ONE:
        for start in range(BLOCK_P, pixels, BLOCK_P):
            x, inside = load_tile(base, start, area, C, BLOCK_P, "evict_last")
            deviation = tl.where(inside, x + shift[None, :] - pivot_c[None, :], 0.0)
            total += deviation
            squares += deviation * deviation
    count = pixels * (1.0 * D)
    beyond = by_group(tl.sum(total, axis=0), place, BLOCK_G) / count
    m2 = by_group(tl.sum(squares, axis=0), place, BLOCK_G) - count * beyond * beyond
    return first, mask, pivot, beyond, tl.maximum(m2, 0.0)


@triton.jit
def combine_moments(
    partials, image, group, real_group, HW, slice_pixels,
    G: tl.constexpr, D: tl.constexpr, SLICES: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Combine the slices' moments (Chan et al. 1983), around the first slice's pivot: mean and M2 [BLOCK_G]."""
    index = tl.arange(0, BLOCK_S)
    count = tl.minimum(slice_pixels, HW - index * slice_pixels)
    count = tl.where(index < SLICES, count * (1.0 * D), 0.0)[:, None]
    here = (index < SLICES)[:, None] & real_group[None, :]
    base = partials + image * (SLICES * 3 * G) + group
    row = base[None, :] + (index * (3 * G))[:, None]
    pivot = tl.load(base, mask=real_group, other=0.0)
    beyond = (tl.load(row, mask=here, other=0.0) - pivot[None, :]) + tl.load(row + G, mask=here, other=0.0)
    mean = tl.sum(beyond * count, axis=0) / (HW * (1.0 * D))
    apart = beyond - mean[None, :]
    m2 = tl.load(row + 2 * G, mask=here, other=0.0) + count * apart * apart
    return pivot + mean, tl.sum(m2, axis=0)


@triton.jit
def activate(b, noise, first_pixel, SILU: tl.constexpr):
    """SiLU, then dropout if there is a key, of [BLOCK_P, BLOCK_C]."""
    if SILU:
        b = b * tl.sigmoid(b)
    return drop(b, noise, first_pixel)


@triton.jit
def statistics_kernel(
    x,  # [N, H, W, C]
    shift,  # [N, C], rows apart by shift_stride, or None
    partials,  # [N, S, 3, G] float32 of a slice: pivot, mean - pivot, sum of squared deviations from the mean
    shift_stride,
    HW,
    slice_pixels,
    C: tl.constexpr,
    G: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WHOLE: tl.constexpr,
):
    D: tl.constexpr = C // G
    image, index, block = locate(SLICES, BLOCKS, False)
    channel, real, place, group, real_group = channel_block(block, C, G, BLOCK_GROUPS, BLOCK_C, BLOCK_G)
    first_pixel = index * slice_pixels
    pixels = tl.minimum(slice_pixels, HW - first_pixel)
    shift_c = load_shift(shift, image * shift_stride, channel, real)
    base = x + (image * HW + first_pixel) * C
    area = (pixels, channel, real, WHOLE)
    _, _, pivot, beyond, m2 = slice_moments(base, area, shift_c, place, C, D, BLOCK_G, BLOCK_P, False)
    row = partials + (image * SLICES + index) * (3 * G) + group
    tl.store(row, pivot, mask=real_group)
    tl.store(row + G, beyond, mask=real_group)
    tl.store(row + 2 * G, m2, mask=real_group)


@triton.jit(do_not_specialize=["layer"])
def normalize_kernel(
    x,  # [N, H, W, C]
    weight,  # [C]
    bias,  # [C]
    shift,  # [N, C], rows apart by shift_stride, or None
    key,  # [2] int64 words or None: no dropout
    sample_index,  # [N] int64
    partials,  # [N, S, 3, G] float32, read where SLICES > 1
    y,  # [N, H, W, C]
    mean,  # [N, G] float32
    rstd,  # [N, G] float32
    shift_stride,
    HW,
    slice_pixels,
    eps,
    layer,
    C: tl.constexpr,
    G: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ONE: tl.constexpr,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
):
    D: tl.constexpr = C // G
    image, index, block = locate(SLICES, BLOCKS, SLICES > 1)
    channel, real, place, group, real_group = channel_block(block, C, G, BLOCK_GROUPS, BLOCK_C, BLOCK_G)
    first_pixel = index * slice_pixels
    pixels = tl.minimum(slice_pixels, HW - first_pixel)
    shift_c = load_shift(shift, image * shift_stride, channel, real)
    offset_in = (image * HW + first_pixel) * C
    x += offset_in
    y += offset_in
    area = (pixels, channel, real, WHOLE)
    if SLICES > 1:
        mean_g, m2 = combine_moments(partials, image, group, real_group, HW, slice_pixels, G, D, SLICES, BLOCK_S)
    else:
        first, mask, pivot, beyond, m2 = slice_moments(x, area, shift_c, place, C, D, BLOCK_G, BLOCK_P, ONE)
        mean_g = pivot + beyond
    rstd_g = 1.0 / tl.sqrt(m2 / (HW * (1.0 * D)) + eps)
    if index == 0:
        tl.store(mean + image * G + group, mean_g, mask=real_group)
        tl.store(rstd + image * G + group, rstd_g, mask=real_group)

    w, offset = load_affine(weight, bias, channel, real)
    gain = by_channel(rstd_g, place) * w
    noise = (key, sample_index, layer, image, block * (BLOCK_GROUPS * D), THRESHOLD, KEEP_SCALE)
    if ONE:
        # What is beyond the pivot is rounding here, so nothing cancels in its product.
        value = first * gain[None, :] + (offset - by_channel(beyond, place) * gain)[None, :]
        store_tile(y, 0, activate(value, noise, 0, SILU), mask, channel, C, BLOCK_P)
    else:
        mean_c = by_channel(mean_g, place) - shift_c
        for start in range(0, pixels, BLOCK_P):
            h, mask = load_tile(x, start, area, C, BLOCK_P, "evict_first")
            value = (h - mean_c[None, :]) * gain[None, :] + offset[None, :]
            value = activate(value, noise, first_pixel + start, SILU)
            store_tile(y, start, value, mask, channel, C, BLOCK_P)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    key: Tensor | None = None,
    sample_index: Tensor | None = None,
    *,
    groups: int,
    silu: bool = True,
    probability: float = 0.0,
    layer: int = 0,
    eps: float = GROUP_NORM_EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `ddpm_fast.ops.reference.group_norm_silu` and the statistics that its backward pass needs.

    Args:
        x: [N, C, H, W] float32, bfloat16 or float16, channels_last.
        weight, bias, shift: as in the reference; float32, bfloat16 or float16, contiguous, but the rows of shift may
            lie anywhere.
        key, sample_index, probability, layer: the reference's `Dropout`; without a key nothing is dropped.
        groups, silu, eps: as in the reference.

    Returns:
        y like x, and mean and rstd [N, G] float32 of x + shift.

    Raises:
        ValueError: an argument is not as said here.
    """
    check_inputs(x, weight, bias, shift, groups)
    random = dropout_arguments(x, key, sample_index, probability, layer)
    chosen, shared = divide(x, groups, dropout=random["key"] is not None)
    N = len(x)
    grid = checks.grid("x", x, N * chosen.slices * shared["BLOCKS"])
    shared |= shift_arguments(shift)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty(N, groups, dtype=torch.float32) for _ in range(2))
    if N == 0:
        return y, mean, rstd
    with torch.cuda.device_of(x):
        partials = None
        if chosen.slices > 1:
            partials = x.new_empty(N, chosen.slices, 3, groups, dtype=torch.float32)
            statistics_kernel[grid](x=x, partials=partials, **shared)
        normalize_kernel[grid](
            x=x,
            weight=weight,
            bias=bias,
            partials=partials,
            y=y,
            mean=mean,
            rstd=rstd,
            eps=eps,
            BLOCK_S=triton.next_power_of_2(chosen.slices),
            ONE=chosen.one_tile,
            SILU=silu,
            **shared,
            **random,
        )
    return y, mean, rstd
