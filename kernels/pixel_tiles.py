"""Tiles of the pixels of one image: where they lie, the images and the noise that fill them.

A tile is BLOCK pixels of one image by up to four channels, the four words of one Philox call a pixel: none is wasted
but on channels that the image does not have. It lies flat, in the order of memory, so that loads and stores are of 16
bytes; three channels, no power of two, are brought into that order by a gather through shared memory.
Offsets within an image are 32 bits, which `checks.image_shape` makes sure of; an image's own offset is 64 bits. Past
the image's end an offset may wrap, but is masked.
Shapes: N images, C channels, H x W pixels; NHWC says which of the two orders of memory a tensor has.
"""

import triton
import triton.language as tl

from ddpm_fast.kernels.philox import GROUP, normals4


@triton.jit
def tile_places(first_pixel, group, HW, C: tl.constexpr, NHWC: tl.constexpr, BLOCK: tl.constexpr):
    """Return pixel, channel, offset within the image, and whether it is there, of the places in a flat tile.

    The tile holds channels 4 * group .. 4 * group + 3 of the pixels first_pixel .. first_pixel + BLOCK - 1.
    """
    WIDTH: tl.constexpr = C if C < 4 else 4
    LANES: tl.constexpr = 4 if C == 3 else WIDTH
    place = tl.arange(0, LANES * BLOCK)
    if NHWC:
        pixel = first_pixel + place // WIDTH
        channel = 4 * group + place % WIDTH
        if C <= 4:
            offset = first_pixel * C + place
            real = (place < WIDTH * BLOCK) & (offset < HW * C)
        else:
            offset = pixel * C + channel
            real = (pixel < HW) & (channel < C)
    else:
        pixel = first_pixel + place % BLOCK
        channel = 4 * group + place // BLOCK
        offset = channel * HW + pixel
        real = (pixel < HW) & (channel < C)
    return pixel, channel, offset, real


@triton.jit
def tile_normals(first_pixel, group, c1, c2, stream, k0, k1, C: tl.constexpr, NHWC: tl.constexpr, BLOCK: tl.constexpr):
    """Return the standard normals of a tile, in the order of `tile_places`."""
    pixel = first_pixel + tl.arange(0, BLOCK)
    z0, z1, z2, z3 = normals4(pixel, c1, c2, stream + GROUP * group, k0, k1)
    if C == 1:
        z = z0
    elif C == 2:
        z = tl.join(z0, z1)
        z = tl.reshape(z if NHWC else tl.trans(z), [2 * BLOCK])
    else:
        # The innermost of the two new axes is the outer join's: [pixel, i, j] holds z of channel 2i + j.
        z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK, 4])
        z = tl.reshape(z if NHWC else tl.trans(z), [4 * BLOCK])
        if NHWC and C == 3:
            place = tl.arange(0, 4 * BLOCK)
            z = tl.gather(z, tl.minimum(place // 3 * 4 + place % 3, 4 * BLOCK - 1), 0)
    return z


@triton.jit
def load_x_start(
    images_ptr, image, pixel, channel, offset, real, flipped, HW, W,
    C: tl.constexpr, IMAGES_NHWC: tl.constexpr, NHWC: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """Load a tile of images (uint8 mapped to [-1, 1], floats as they are), mirrored where `flipped` (a scalar) says.

    Two masked reads, of which one moves nothing: so images that are not mirrored are read in wide vectors, which a
    branch prevents.
    """
    base = images_ptr + image.to(tl.int64) * HW * C
    if IMAGES_NHWC == NHWC:
        straight = offset
    elif IMAGES_NHWC:
        straight = pixel * C + channel
    else:
        straight = channel * HW + pixel
    if MIRROR:
        shift = W - 1 - 2 * (pixel % W)
        mirrored = straight + (shift * C if IMAGES_NHWC else shift)
        value = tl.load(base + straight, mask=real & (not flipped), other=0)
        value = tl.where(flipped, tl.load(base + mirrored, mask=real & flipped, other=0), value)
    else:
        value = tl.load(base + straight, mask=real, other=0)
    if images_ptr.dtype.element_ty == tl.uint8:
        x_start = (value.to(tl.float32) - 127.5) * 0.00784313725490196  # 1 / 127.5; the difference is exact
    else:
        x_start = value.to(tl.float32)
    return x_start


@triton.jit
def load_column(row_ptr, column: tl.constexpr, inside):
    """Load one number of a table's row; NaN where the row's number lies outside the table, never other memory."""
    return tl.load(row_ptr + column, mask=inside, other=float("nan"))


def tile_pixels(channels: int, pixels: int) -> tuple[int, int]:
    """Return BLOCK and num_warps of a tile: at most 2048 places, 16 a thread, so that 16-bit vectors have 16 bytes."""
    lanes = {1: 1, 2: 2}.get(channels, 4)
    block = min(triton.next_power_of_2(pixels), 2048 // lanes)
    return block, max(1, min(4, block * lanes // 512))
