"""Tiles of the pixels of one image: where they lie, the images and the noise that fill them.

A tile is BLOCK pixels of one image with all their channels, of which there are at most four: the four words of one
Philox call per pixel. It lies flat, in the order of memory, so that loads and stores are of 16 bytes; three channels,
no power of two, are brought into that order by a gather through shared memory.
Offsets within an image are 32 bits, which `checks.image_shape` makes sure of; an image's own offset is 64 bits. Past
the image's end an offset may wrap, but is masked.
Shapes: N images, C channels, H x W pixels; all images are NHWC.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels import checks
from ddpm_fast.kernels.philox import normals4

MOST_CHANNELS = 4


@triton.jit
def tile_places(first_pixel, HW, C: tl.constexpr, BLOCK: tl.constexpr):
    """Return pixel, offset within the image, and whether it is there, of the places in a flat tile."""
    LANES: tl.constexpr = 4 if C == 3 else C
    place = tl.arange(0, LANES * BLOCK)
    offset = first_pixel * C + place
    return first_pixel + place // C, offset, (place < C * BLOCK) & (offset < HW * C)


@triton.jit
def tile_normals(first_pixel, c1, c2, stream, k0, k1, C: tl.constexpr, BLOCK: tl.constexpr):
    """Return the standard normals of a tile, in the order of `tile_places`."""
    pixel = first_pixel + tl.arange(0, BLOCK)
    z0, z1, z2, z3 = normals4(pixel, c1, c2, stream, k0, k1)
    if C == 1:
        z = z0
    elif C == 2:
        z = tl.reshape(tl.join(z0, z1), [2 * BLOCK])
    else:
        # The innermost of the two new axes is the outer join's: [pixel, i, j] holds z of channel 2i + j.
        z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [4 * BLOCK])
        if C == 3:
            place = tl.arange(0, 4 * BLOCK)
            z = tl.gather(z, tl.minimum(place // 3 * 4 + place % 3, 4 * BLOCK - 1), 0)
    return z


@triton.jit
def load_x_start(images_ptr, image, pixel, offset, real, flipped, HW, W, C: tl.constexpr, MIRROR: tl.constexpr):
    """Load a tile of images (uint8 mapped to [-1, 1], floats as they are), mirrored where `flipped` (a scalar) says.

    Two masked reads, of which one moves nothing: so images that are not mirrored are read in wide vectors, which a
    branch prevents.
    """
    base = images_ptr + image.to(tl.int64) * HW * C
    if MIRROR:
        mirrored = offset + (W - 1 - 2 * (pixel % W)) * C
        value = tl.load(base + offset, mask=real & (not flipped), other=0)
        value = tl.where(flipped, tl.load(base + mirrored, mask=real & flipped, other=0), value)
    else:
        value = tl.load(base + offset, mask=real, other=0)
    if images_ptr.dtype.element_ty == tl.uint8:
        x_start = (value.to(tl.float32) - 127.5) * 0.00784313725490196  # 1 / 127.5; the difference is exact
    else:
        x_start = value.to(tl.float32)
    return x_start


@triton.jit
def load_column(row_ptr, column: tl.constexpr, inside):
    """Load one number of a table's row; NaN where the row's number lies outside the table, never other memory."""
    return tl.load(row_ptr + column, mask=inside, other=float("nan"))


def tile_arguments(name: str, images: Tensor) -> dict[str, Any]:
    """Return the tiles of images [N, C, H, W] as the kernels take them.

    A tile has at most 2048 places, 16 per thread, so that vectors of 16-bit numbers have 16 bytes.

    Raises:
        ValueError: the images have too many channels, or `checks.image_shape` refuses them.
    """
    _, C, H, W = checks.image_shape(name, images)
    if C > MOST_CHANNELS:
        raise ValueError(f"{name} has shape {list(images.shape)}: it takes at most {MOST_CHANNELS} channels")
    lanes = 4 if C == 3 else C
    block = min(triton.next_power_of_2(H * W), 2048 // lanes)
    warps = max(1, min(4, block * lanes // 512))
    return {"HW": H * W, "tiles": triton.cdiv(H * W, block), "C": C, "BLOCK": block, "num_warps": warps}
