"""Mean and variance of each group in `group_norm_silu`, of a slice of pixels and of all slices together.

They are sums around a pivot, the mean of the program's first tile. That tile is a fraction f of the slice, so
variance >= f * (pivot - mean)^2, and the subtraction at the end loses at most log2(1 + 1/f) bits; with one tile it is
the corrected two-pass formula.

Shapes: H x W pixels, C channels, G groups of D channels, S slices of pixels.
"""

import triton
import triton.language as tl

from ddpm_fast.kernels.group_norm_tiles import by_channel, by_group, store_tile
from ddpm_fast.kernels.joined_tiles import load_sum


@triton.jit
def slice_moments(
    terms, h, area, shift, place,
    C: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Return h - pivot of the slice's first tile, its mask, and pivot, mean - pivot and M2 [BLOCK_G].

    h, if it is not None, is where that tile is stored if it is the only one.
    """
    pixels, channel, _, _ = area
    x, mask = load_sum(terms, 0, area, C, BLOCK_P, "evict_last")
    first = tl.where(mask, x + shift[None, :], 0.0)
    if ONE and h is not None:
        store_tile(h, 0, first, mask, channel, C, BLOCK_P)
    pivot = by_group(tl.sum(first, axis=0), place, BLOCK_G) / (tl.minimum(pixels, BLOCK_P) * (1.0 * D))
    pivot_c = by_channel(pivot, place)
    first = tl.where(mask, first - pivot_c[None, :], 0.0)
    total, squares = first, first * first
    if not ONE:
        for start in range(BLOCK_P, pixels, BLOCK_P):
            x, inside = load_sum(terms, start, area, C, BLOCK_P, "evict_last")
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
