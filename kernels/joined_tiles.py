"""Tiles of a feature map that is a sum, and whose last channels may lie in another tensor.

    h = x + added + shift, and beside h's channels those of `beside`

is what a residual branch begins with: in a skip connection, say, 256 channels and 128 in 32 groups, of which one has
channels of both. A kernel that reads them anyway adds up, and writes the result for who else needs it; left to a
compiler that cannot see into the kernel, this is a pass of its own, which writes h and has it read again. The gradient
leaves in two dense maps: halves of one would be copied by each convolution that reads them.

Shapes: H x W pixels, C channels of h and of all beside it, FIRST of h itself.
"""

import triton
import triton.language as tl

from ddpm_fast.kernels.group_norm_tiles import load_tile, store_tile, tile_mask


@triton.jit
def load_sum(terms, start, area, C: tl.constexpr, BLOCK_P: tl.constexpr, POLICY: tl.constexpr):
    """Load x + added of all channels, as `load_tile` does, and the mask.

    terms: x and added [N, H, W, FIRST] and beside [N, H, W, C - FIRST], of which the last two may be None, FIRST, and
    the slice's first pixel, counted over all images.
    """
    x, added, beside, FIRST, origin = terms
    pixels, channel, real, _ = area
    x += origin * FIRST
    mask = tile_mask(start, area, BLOCK_P)
    if beside is None:
        value, _ = load_tile(x, start, area, C, BLOCK_P, POLICY)
        if added is not None:
            more, _ = load_tile(added + origin * FIRST, start, area, C, BLOCK_P, POLICY)
            value += more
    else:
        inside = (pixels, channel, real & (channel < FIRST), False)
        outside = (pixels, channel, real & (channel >= FIRST), False)
        value, _ = load_tile(x, start, inside, FIRST, BLOCK_P, POLICY)
        more, _ = load_tile(beside + origin * (C - FIRST) - FIRST, start, outside, C - FIRST, BLOCK_P, POLICY)
        value += more
        if added is not None:
            more, _ = load_tile(added + origin * FIRST, start, inside, FIRST, BLOCK_P, POLICY)
            value += more
    return value, mask


@triton.jit
def store_apart(
    first, second, start, value, mask, channel, C: tl.constexpr, FIRST: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Store [BLOCK_P, BLOCK_C] at pixel `start` of a slice: channels below FIRST in one map, the others in a second.

    first: [H, W, FIRST]; second: [H, W, C - FIRST], or None where FIRST is C; each from the slice on.
    """
    if second is None:
        store_tile(first, start, value, mask, channel, C, BLOCK_P)
    else:
        inside = (channel < FIRST)[None, :]
        store_tile(first, start, value, mask & inside, channel, FIRST, BLOCK_P)
        store_tile(second - FIRST, start, value, mask & (channel >= FIRST)[None, :], channel, C - FIRST, BLOCK_P)
