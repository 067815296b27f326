"""What q_sample and noise_mse share: an example's row of the training table, and its x_start and eps over a tile.

A program owns a tile of one image (`pixel_tiles`). Shapes: N images, C channels, H x W pixels, T timesteps.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.constants import TRAINING_COLUMN
from ddpm_fast.kernels import checks
from ddpm_fast.kernels.philox import FLIP, TRAINING, first_word, load_key, load_word
from ddpm_fast.kernels.pixel_tiles import load_x_start, tile_arguments, tile_normals, tile_places

COLUMNS = tl.constexpr(len(TRAINING_COLUMN))


@triton.jit
def locate_example(t_ptr, table_ptr, key_ptr, sample_index_ptr, T, tiles, MIRROR: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's image and first pixel, its table row and whether there is one, and its noise.

    The noise is the example's number, the key's two words, and whether the image is mirrored.
    """
    image = tl.program_id(0) // tiles
    first_pixel = (tl.program_id(0) % tiles) * BLOCK
    k0, k1 = load_key(key_ptr)
    sample = load_word(sample_index_ptr + image)
    t = tl.load(t_ptr + image)
    flipped = first_word(sample, FLIP, k0, k1) >= 0x80000000 if MIRROR else False
    return image, first_pixel, table_ptr + t * COLUMNS, (t >= 0) & (t < T), (sample, k0, k1, flipped)


@triton.jit
def load_example(
    images_ptr, image, first_pixel, noise, HW, W, C: tl.constexpr, MIRROR: tl.constexpr, BLOCK: tl.constexpr
):
    """Return x_start and eps over a tile, and the places' offsets from the first image and their mask."""
    sample, k0, k1, flipped = noise
    pixel, offset, real = tile_places(first_pixel, HW, C, BLOCK)
    x_start = load_x_start(images_ptr, image, pixel, offset, real, flipped, HW, W, C, MIRROR)
    eps = tile_normals(first_pixel, sample, 0, TRAINING, k0, k1, C, BLOCK)
    return x_start, eps, image.to(tl.int64) * HW * C + offset, real


def example_arguments(
    images: Tensor, t: Tensor, table: Tensor, key: Tensor, sample_index: Tensor, flip: bool
) -> dict[str, Any]:
    """Check training examples, and return them as the kernels' arguments.

    Raises:
        ValueError: a shape, dtype, device or layout is not taken.
    """
    tiles, device, N = tile_arguments("images", images), images.device, len(images)
    checks.check_images("images", images, images.shape, (torch.uint8, *checks.FLOATS), device)
    checks.check_dense("t", t, (N,), (torch.int64,), device)
    checks.check_dense("table", table, (len(table), COLUMNS.value), (torch.float32,), device)
    checks.check_address(key, sample_index, N, device)
    lookups = {"t_ptr": t, "table_ptr": table, "key_ptr": key, "sample_index_ptr": sample_index, "T": len(table)}
    return {"images_ptr": images, **lookups, **tiles, "W": images.shape[3], "MIRROR": flip}
