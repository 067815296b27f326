"""q_sample: x_t = signal[t] * x_start + noise[t] * eps (Ho et al. 2020, Eq. 4), normalisation, flip and noise inside.

Layout: images and x_t NHWC; a program owns a tile of one image (`pixel_tiles`). Arithmetic in float32. Bytes moved:
each image element read once, each of x_t written once; the noise is never stored. Nothing is kept for a backward pass:
`noise_mse` makes the noise again. Deterministic: no sums. Not yet timed on a GPU.
Shapes: N images, C channels, H x W pixels, T timesteps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.constants import TRAINING_COLUMN
from ddpm_fast.kernels import checks
from ddpm_fast.kernels.pixel_tiles import load_column
from ddpm_fast.kernels.training_tiles import example_arguments, load_example, locate_example

SIGNAL = tl.constexpr(TRAINING_COLUMN.signal)
NOISE = tl.constexpr(TRAINING_COLUMN.noise)


@triton.jit
def q_sample_kernel(
    x_t_ptr,  # [N, H, W, C]
    images_ptr,  # [N, H, W, C] uint8 or float
    t_ptr,  # [N] int64
    table_ptr,  # [T, 5] float32
    key_ptr,  # [2] int64
    sample_index_ptr,  # [N] int64
    HW,
    W,
    T,
    tiles,  # of an image
    C: tl.constexpr,
    MIRROR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, first_pixel, row_ptr, inside, noise = locate_example(
        t_ptr, table_ptr, key_ptr, sample_index_ptr, T, tiles, MIRROR, BLOCK
    )
    signal_scale = load_column(row_ptr, SIGNAL, inside)
    noise_scale = load_column(row_ptr, NOISE, inside)
    x_start, eps, place, real = load_example(images_ptr, image, first_pixel, noise, HW, W, C, MIRROR, BLOCK)
    tl.store(x_t_ptr + place, signal_scale * x_start + noise_scale * eps, mask=real)


def q_sample(
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    *,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Diffuse images to timestep t; arguments and result as `ddpm_fast.ops.reference.q_sample`, in float32 arithmetic.

    Raises:
        ValueError: a shape, dtype, device or layout is not taken. A t outside the table gives NaN.
    """
    arguments = example_arguments(images, t, table, key, sample_index, flip)
    checks.check_dtype("dtype", dtype, checks.FLOATS)
    grid = checks.grid("images", images, len(images) * arguments["tiles"])
    x_t = torch.empty_like(images, dtype=dtype, memory_format=torch.channels_last)
    if len(images):
        with torch.cuda.device_of(images):
            q_sample_kernel[grid](x_t_ptr=x_t, **arguments)
    return x_t
