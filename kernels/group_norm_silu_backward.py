"""group_norm_silu_backward: the gradients of `group_norm_silu`.

With u = x + shift - mean, slope = rstd * weight, b = u * slope + bias, s = sigmoid(b) and M = H * W * D elements per
group:

    db = dy * s * (1 + b * (1 - s))                 after dropout, made again from its address
    per image and channel, sums over pixels         A = sum db    B = sum db * u    U = sum u
    per image and group, sums over channels         c1 = sum slope * A / M    c2 = rstd^2 * sum slope * B / M
    dx = db * slope - c1 - u * c2                   dshift = slope * A - H * W * c1 - U * c2
    dweight = sum over images rstd * B              dbias = sum over images A

Where x also goes to a residual connection, the gradient from there, `other`, is added in float32 while dx is written:
left to autograd, that is a pass of its own, two reads and a write.

Layout and division of the work: see `group_norm_tiles`; a split gathers A, B and U of slices, [N, S, 3, C]. Arithmetic
in float32. Kept from the forward pass: x, mean and rstd, nothing of y. The sums over images are taken from [N, 2, C]
float32 by a last small kernel. No atomics, every order fixed: two runs agree bit for bit.
Bytes moved, of 2 or 4 per element: 3 elements' worth (one tile, loop) or 5 (split), 1 more of `other`. Not yet timed.
Shapes: N image, C channel, H x W pixels, G group, D = C / G channels per group, S slice of pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels import checks
from ddpm_fast.kernels.group_norm_parameters import parameter_gradients
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
)
from ddpm_fast.kernels.joined_tiles import store_apart


@triton.jit
def load_gradient(
    x, dy, start, first_pixel, area, normal, noise,
    C: tl.constexpr, BLOCK_P: tl.constexpr, POLICY: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Return u and db [BLOCK_P, BLOCK_C], zero outside, and the mask.

    normal: of each channel [BLOCK_C] the mean less the shift, slope and bias: b = (x - mean) * slope + bias.
    """
    mean, slope, bias = normal
    h, mask = load_tile(x, start, area, C, BLOCK_P, POLICY)
    db, mask = load_tile(dy, start, area, C, BLOCK_P, POLICY)
    u = tl.where(mask, h - mean[None, :], 0.0)
    db = drop(db, noise, first_pixel + start)
    if SILU:
        b = u * slope[None, :] + bias[None, :]
        s = tl.sigmoid(b)
        db = db * (s * (1.0 + b * (1.0 - s)))
    return u, db, mask


@triton.jit
def normal_of(mean, rstd, weight, bias, shift, image, where, C: tl.constexpr, G: tl.constexpr):
    """Return rstd [BLOCK_C], and what `load_gradient` calls normal; shift: pointer and stride."""
    channel, real, _, _, _ = where
    w, b = load_affine(weight, bias, channel, real)
    of_group = image * G + channel // (C // G)
    rstd_c = tl.load(rstd + of_group, mask=real, other=0.0)
    shift_c = load_shift(shift[0], image * shift[1], channel, real)
    mean_c = tl.load(mean + of_group, mask=real, other=0.0) - shift_c
    return rstd_c, (mean_c, rstd_c * w, b)


@triton.jit
def slice_sums(
    x, dy, first_pixel, area, normal, noise,
    C: tl.constexpr, BLOCK_P: tl.constexpr, ONE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Return the slice's first tile of u and db with its mask, and A, B and U [BLOCK_C]."""
    pixels = area[0]
    u, db, mask = load_gradient(x, dy, 0, first_pixel, area, normal, noise, C, BLOCK_P, "evict_last", SILU)
    a, b, total = db, db * u, u
    if not ONE:
        for start in range(BLOCK_P, pixels, BLOCK_P):
            next_u, next_db, _ = load_gradient(
                x, dy, start, first_pixel, area, normal, noise, C, BLOCK_P, "evict_last", SILU
            )
            a += next_db
            b += next_db * next_u
            total += next_u
    return u, db, mask, tl.sum(a, axis=0), tl.sum(b, axis=0), tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["layer"])
def sums_kernel(
    x,  # [N, H, W, C]
    dy,  # [N, H, W, C]
    mean,  # [N, G] float32
    rstd,  # [N, G] float32
    weight,  # [C]
    bias,  # [C]
    shift,  # [N, C], rows apart by shift_stride, or None
    key,  # [2] int64 words or None: no dropout
    sample_index,  # [N] int64
    partials,  # [N, S, 3, C] float32: A, B, U of a slice
    shift_stride,
    HW,
    slice_pixels,
    layer,
    C: tl.constexpr, G: tl.constexpr, SLICES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WHOLE: tl.constexpr,
    SILU: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
):  # fmt: skip
    image, index, block = locate(SLICES, BLOCKS, False)
    where = channel_block(block, C, G, BLOCK_GROUPS, BLOCK_C, BLOCK_G)
    channel, real, _, _, _ = where
    _, normal = normal_of(mean, rstd, weight, bias, (shift, shift_stride), image, where, C, G)
    noise = (key, sample_index, layer, image, block * (BLOCK_GROUPS * (C // G)), THRESHOLD, KEEP_SCALE)
    first_pixel = index * slice_pixels
    pixels = tl.minimum(slice_pixels, HW - first_pixel)
    start = (image * HW + first_pixel) * C
    area = (pixels, channel, real, WHOLE)
    _, _, _, a, b, total = slice_sums(x + start, dy + start, first_pixel, area, normal, noise, C, BLOCK_P, False, SILU)
    row = partials + (image * SLICES + index) * (3 * C) + channel
    tl.store(row, a, mask=real)
    tl.store(row + C, b, mask=real)
    if shift is not None:
        tl.store(row + 2 * C, total, mask=real)


@triton.jit
def sum_slices(partials, image, channel, real, C: tl.constexpr, SLICES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Sum one of A, B, U over the slices: [BLOCK_C]."""
    index = tl.arange(0, BLOCK_S)
    row = partials + image * (SLICES * 3 * C) + (index * (3 * C))[:, None] + channel[None, :]
    return tl.sum(tl.load(row, mask=(index < SLICES)[:, None] & real[None, :], other=0.0), axis=0)


@triton.jit(do_not_specialize=["layer"])
def input_gradient_kernel(
    x,  # [N, H, W, C]
    dy,  # [N, H, W, C]
    mean,  # [N, G] float32
    rstd,  # [N, G] float32
    weight,  # [C]
    bias,  # [C]
    shift,  # [N, C], rows apart by shift_stride, or None
    key,  # [2] int64 words or None: no dropout
    sample_index,  # [N] int64
    other,  # [N, H, W, C], added to dx, or None
    partials,  # [N, S, 3, C] float32, read where SLICES > 1
    dx,  # [N, H, W, FIRST]
    dbeside,  # [N, H, W, C - FIRST], or None where FIRST is C
    dshift,  # [N, C] or None
    parameter_sums,  # [N, 2, C] float32: an image's part of dweight and dbias
    shift_stride,
    HW,
    slice_pixels,
    layer,
    C: tl.constexpr, G: tl.constexpr, SLICES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_S: tl.constexpr, ONE: tl.constexpr, FIRST: tl.constexpr,
    SILU: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
):  # fmt: skip
    image, index, block = locate(SLICES, BLOCKS, SLICES > 1)
    where = channel_block(block, C, G, BLOCK_GROUPS, BLOCK_C, BLOCK_G)
    channel, real, place, _, _ = where
    rstd_c, normal = normal_of(mean, rstd, weight, bias, (shift, shift_stride), image, where, C, G)
    _, slope, _ = normal
    noise = (key, sample_index, layer, image, block * (BLOCK_GROUPS * (C // G)), THRESHOLD, KEEP_SCALE)
    first_pixel = index * slice_pixels
    pixels = tl.minimum(slice_pixels, HW - first_pixel)
    start_of_slice = (image * HW + first_pixel) * C
    x += start_of_slice
    dy += start_of_slice
    dx += (image * HW + first_pixel) * FIRST
    if dbeside is not None:
        dbeside += (image * HW + first_pixel) * (C - FIRST)
    if other is not None:
        other += start_of_slice
    area = (pixels, channel, real, WHOLE)
    if SLICES > 1:
        a = sum_slices(partials, image, channel, real, C, SLICES, BLOCK_S)
        b = sum_slices(partials + C, image, channel, real, C, SLICES, BLOCK_S)
    else:
        u, db, mask, a, b, total = slice_sums(x, dy, first_pixel, area, normal, noise, C, BLOCK_P, ONE, SILU)
    members = HW * (1.0 * (C // G))
    c1 = by_channel(by_group(slope * a, place, BLOCK_G) / members, place)
    c2 = by_channel(by_group(slope * b, place, BLOCK_G) / members, place) * (rstd_c * rstd_c)
    if ONE:
        value = db * slope[None, :] - c1[None, :] - u * c2[None, :]
        if other is not None:  # not loaded before the sums: it would take up registers while they are taken
            added, mask = load_tile(other, 0, area, C, BLOCK_P, "evict_first")
            value += added
        store_apart(dx, dbeside, 0, value, mask, channel, C, FIRST, BLOCK_P)
    else:
        for start in range(0, pixels, BLOCK_P):
            next_u, next_db, inside = load_gradient(
                x, dy, start, first_pixel, area, normal, noise, C, BLOCK_P, "evict_first", SILU
            )
            value = next_db * slope[None, :] - c1[None, :] - next_u * c2[None, :]
            if other is not None:
                added, inside = load_tile(other, start, area, C, BLOCK_P, "evict_first")
                value += added
            store_apart(dx, dbeside, start, value, inside, channel, C, FIRST, BLOCK_P)

    if index == 0:
        if dshift is not None:
            if SLICES > 1:
                total = sum_slices(partials + 2 * C, image, channel, real, C, SLICES, BLOCK_S)
            tl.store(dshift + image * C + channel, slope * a - HW * c1 - total * c2, mask=real)
        tl.store(parameter_sums + 2 * image * C + channel, rstd_c * b, mask=real)
        tl.store(parameter_sums + (2 * image + 1) * C + channel, a, mask=real)


def group_norm_silu_backward(
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    key: Tensor | None = None,
    sample_index: Tensor | None = None,
    other: Tensor | None = None,
    *,
    groups: int,
    silu: bool = True,
    probability: float = 0.0,
    layer: int = 0,
    beside: int = 0,
) -> list[Tensor]:
    """Compute the gradients of `group_norm_silu`.

    Args:
        dy: [N, C, H, W], the loss's gradient by y; x's dtype, channels_last.
        mean, rstd: [N, G] float32, from the forward pass.
        x and what follows: as in the forward pass.
        other: like dy, to be added to dx: the loss's gradient by x from where else x is used.
        beside: how many of x's last channels were joined to it from another map.

    Returns:
        dx, dweight, dbias and, if there is a shift, dshift, each like what it belongs to. If there are such channels,
        dx is of the others, and last comes that of these.

    Raises:
        ValueError: an argument is not as said here.
    """
    check_inputs(x, weight, bias, shift, groups)
    N, C, H, W = x.shape
    if not 0 <= beside < C:
        raise ValueError(f"beside is {beside}: it takes fewer than {C} channels")
    checks.check_images("dy", dy, x.shape, (x.dtype,), x.device)
    if other is not None:
        checks.check_images("other", other, x.shape, (x.dtype,), x.device)
    checks.check_dense("mean", mean, (N, groups), (torch.float32,), x.device)
    checks.check_dense("rstd", rstd, (N, groups), (torch.float32,), x.device)
    random = dropout_arguments(x, key, sample_index, probability, layer)
    options = {"shift": shift is not None, "more": random["key"] is not None, "joined": beside > 0}
    chosen, shared = divide(x, groups, inputs=2, **options)
    grid = checks.grid("x", x, N * chosen.slices * shared["BLOCKS"])
    shared |= {"x": x, "dy": dy, "mean": mean, "rstd": rstd, "weight": weight, "bias": bias}
    shared |= shift_arguments(shift) | random | {"partials": None, "SILU": silu}
    dx, dbeside = (x.new_empty(N, H, W, channels).permute(0, 3, 1, 2) for channels in (C - beside, beside))
    dshift = None if shift is None else shift.new_empty(N, C)
    parameter_sums = x.new_empty(N, 2, C, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if N and chosen.slices > 1:
            shared["partials"] = x.new_empty(N, chosen.slices, 3, C, dtype=torch.float32)
            sums_kernel[grid](**shared)
        if N:
            shared |= {"BLOCK_S": triton.next_power_of_2(chosen.slices), "ONE": chosen.one_tile, "FIRST": C - beside}
            shared |= {"other": other, "dx": dx, "dbeside": dbeside if beside else None, "dshift": dshift}
            input_gradient_kernel[grid](parameter_sums=parameter_sums, **shared)
        dweight, dbias = parameter_gradients(parameter_sums, weight, bias)
    return [dx, dweight, dbias, *([] if dshift is None else [dshift]), *([dbeside] if beside else [])]
