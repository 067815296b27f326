"""group_norm_silu: GroupNorm, SiLU, the time embedding's shift and dropout over NHWC, forward.

    h = x + shift                                    n = (h - mean) * rstd   over each group of an image
    b = n * weight + bias                            y = dropout(b * sigmoid(b))

and group_norm_silu_of_sum, where h has more terms, and is a result as well: see `joined_tiles`.

Layout and division of the work: see `group_norm_tiles`. Arithmetic and statistics are float32. Kept for the backward
pass: mean and rstd [N, G] float32; dropout is made again from its address.
Bytes moved, of 2 or 4 per element: 2 elements' worth (one tile, loop) or 3 (split), and 1 for each more term and for h.

Statistics: see `group_norm_moments`. No atomics, every order fixed: two runs agree bit for bit. Not yet timed on a GPU.

Shapes: N image, C channel, H x W pixels, G group, D = C / G channels per group, S slice of pixels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.constants import GROUP_NORM_EPS
from ddpm_fast.kernels import checks
from ddpm_fast.kernels.group_norm_moments import combine_moments, slice_moments
from ddpm_fast.kernels.group_norm_tiles import (
    by_channel,
    channel_block,
    check_inputs,
    divide,
    drop,
    dropout_arguments,
    load_affine,
    load_shift,
    locate,
    shift_arguments,
    store_tile,
)
from ddpm_fast.kernels.joined_tiles import load_sum


@triton.jit
def activate(b, noise, first_pixel, SILU: tl.constexpr):
    """SiLU, then dropout if there is a key, of [BLOCK_P, BLOCK_C]."""
    if SILU:
        b = b * tl.sigmoid(b)
    return drop(b, noise, first_pixel)


@triton.jit
def statistics_kernel(
    x,  # [N, H, W, FIRST]
    added,  # [N, H, W, FIRST] or None
    beside,  # [N, H, W, C - FIRST], or None where FIRST is C
    shift,  # [N, FIRST], rows apart by shift_stride, or None
    partials,  # [N, S, 3, G] float32 of a slice: pivot, mean - pivot, sum of squared deviations from the mean
    shift_stride,
    HW,
    slice_pixels,
    C: tl.constexpr,
    FIRST: tl.constexpr,
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
    shift_c = load_shift(shift, image * shift_stride, channel, real & (channel < FIRST))
    terms = (x, added, beside, FIRST, image * HW + first_pixel)
    area = (pixels, channel, real, WHOLE)
    _, _, pivot, beyond, m2 = slice_moments(terms, None, area, shift_c, place, C, D, BLOCK_G, BLOCK_P, False)
    row = partials + (image * SLICES + index) * (3 * G) + group
    tl.store(row, pivot, mask=real_group)
    tl.store(row + G, beyond, mask=real_group)
    tl.store(row + 2 * G, m2, mask=real_group)


@triton.jit(do_not_specialize=["layer"])
def normalize_kernel(
    x,  # [N, H, W, FIRST]
    added,  # [N, H, W, FIRST] or None
    beside,  # [N, H, W, C - FIRST], or None where FIRST is C
    weight,  # [C]
    bias,  # [C]
    shift,  # [N, FIRST], rows apart by shift_stride, or None
    key,  # [2] int64 words or None: no dropout
    sample_index,  # [N] int64
    partials,  # [N, S, 3, G] float32, read where SLICES > 1
    h,  # [N, H, W, C] or None
    y,  # [N, H, W, C]
    mean,  # [N, G] float32
    rstd,  # [N, G] float32
    shift_stride,
    HW,
    slice_pixels,
    eps,
    layer,
    C: tl.constexpr,
    FIRST: tl.constexpr,
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
    shift_c = load_shift(shift, image * shift_stride, channel, real & (channel < FIRST))
    terms = (x, added, beside, FIRST, image * HW + first_pixel)
    y += (image * HW + first_pixel) * C
    if h is not None:
        h += (image * HW + first_pixel) * C
    area = (pixels, channel, real, WHOLE)
    if SLICES > 1:
        mean_g, m2 = combine_moments(partials, image, group, real_group, HW, slice_pixels, G, D, SLICES, BLOCK_S)
    else:
        first, mask, pivot, beyond, m2 = slice_moments(terms, h, area, shift_c, place, C, D, BLOCK_G, BLOCK_P, ONE)
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
        mean_c = by_channel(mean_g, place)
        for start in range(0, pixels, BLOCK_P):
            value, mask = load_sum(terms, start, area, C, BLOCK_P, "evict_first")
            value += shift_c[None, :]
            if h is not None:
                store_tile(h, start, value, mask, channel, C, BLOCK_P)
            value = (value - mean_c[None, :]) * gain[None, :] + offset[None, :]
            value = activate(value, noise, first_pixel + start, SILU)
            store_tile(y, start, value, mask, channel, C, BLOCK_P)


def launch(
    of_input: dict[str, Any], of_output: dict[str, Any], y: Tensor, groups: int, silu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Write what `normalize_kernel` writes, and return mean and rstd [N, G] float32.

    of_input: the arguments of both kernels that say what h is; of_output: those of `normalize_kernel` alone.
    """
    N, x = len(y), of_input["x"]
    more, joined = of_output["key"] is not None or of_input["added"] is not None, of_input["beside"] is not None
    chosen, shared = divide(y, groups, more=more, joined=joined)
    grid = checks.grid("x", y, N * chosen.slices * shared["BLOCKS"])
    shared |= {"FIRST": x.shape[1], **of_input}
    mean, rstd = (y.new_empty(N, groups, dtype=torch.float32) for _ in range(2))
    if N == 0:
        return mean, rstd
    with torch.cuda.device_of(y):
        partials = None
        if chosen.slices > 1:
            partials = y.new_empty(N, chosen.slices, 3, groups, dtype=torch.float32)
            statistics_kernel[grid](partials=partials, **shared)
        options = {"BLOCK_S": triton.next_power_of_2(chosen.slices), "ONE": chosen.one_tile, "SILU": silu}
        normalize_kernel[grid](partials=partials, y=y, mean=mean, rstd=rstd, eps=eps, **options, **shared, **of_output)
    return mean, rstd


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
    of_input = {"x": x, "added": None, "beside": None, **shift_arguments(shift)}
    random = dropout_arguments(x, key, sample_index, probability, layer)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, *launch(of_input, {"weight": weight, "bias": bias, "h": None, **random}, y, groups, silu, eps)


def group_norm_silu_of_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    beside: Tensor | None = None,
    *,
    groups: int,
    silu: bool = True,
    eps: float = GROUP_NORM_EPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `ddpm_fast.ops.reference.group_norm_silu_and_residual` and the statistics for its backward pass.

    Args:
        x, shift: as for `group_norm_silu`; weight and bias are of all channels.
        added: like x.
        beside: [N, B, H, W], otherwise like x.
        groups, silu, eps: as in the reference.

    Returns:
        y and h [N, C + B, H, W] like x, and mean and rstd [N, G] float32 of h.

    Raises:
        ValueError: an argument is not as said here.
    """
    N, C, H, W = checks.image_shape("x", x)
    channels = C + (0 if beside is None else beside.shape[1])
    check_inputs(x, weight, bias, shift, groups, channels)
    if added is not None:
        checks.check_images("added", added, x.shape, (x.dtype,), x.device)
    if beside is not None:
        checks.check_images("beside", beside, (N, channels - C, H, W), (x.dtype,), x.device)
    h = x.new_empty(N, H, W, channels).permute(0, 3, 1, 2)
    checks.image_shape("x beside the other", h)
    of_input = {"x": x, "added": added, "beside": beside, **shift_arguments(shift)}
    no_dropout = dropout_arguments(x, None, None, 0.0, 0)
    y = torch.empty_like(h)
    return y, h, *launch(of_input, {"weight": weight, "bias": bias, "h": h, **no_dropout}, y, groups, silu, eps)
