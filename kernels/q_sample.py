"""q_sample: x_t = a[t] * x_start + b[t] * eps (Ho et al. 2020, Eq. 4), normalisation, flip and noise inside.

Layout: images NHWC or NCHW, x_t in either; a program owns a tile of one image (`pixel_tiles`) in x_t's order of memory.
Arithmetic in float32. Bytes moved: each image element read once, each of x_t written once; the noise is never stored.
Nothing is kept for a backward pass: `noise_mse` makes the noise again. Deterministic: no sums. Not yet timed on a GPU.
Shapes: N images, C channels, H x W pixels, T timesteps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels import checks
from ddpm_fast.kernels.pixel_tiles import load_column
from ddpm_fast.kernels.training_tiles import COLUMN_A, COLUMN_B, example_arguments, load_example, locate_example


@triton.jit
def q_sample_kernel(
    x_t_ptr,  # [N, C, H, W], NHWC or NCHW
    images_ptr,  # [N, C, H, W] uint8 or float, IMAGES_NHWC or NCHW
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
    NHWC: tl.constexpr,
    IMAGES_NHWC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, first_pixel, row_ptr, inside, noise = locate_example(
        t_ptr, table_ptr, key_ptr, sample_index_ptr, T, tiles, MIRROR, BLOCK
    )
    a = load_column(row_ptr, COLUMN_A, inside)
    b = load_column(row_ptr, COLUMN_B, inside)
    for group in range((C + 3) // 4):
        x_start, eps, place, real = load_example(
            images_ptr, image, group, first_pixel, noise, HW, W, C, MIRROR, NHWC, IMAGES_NHWC, BLOCK
        )
        tl.store(x_t_ptr + place, a * x_start + b * eps, mask=real)


def q_sample(
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Diffuse images to timestep t; arguments and result as `ddpm_fast.reference.q_sample`, in float32 arithmetic.

    Raises:
        ValueError: a shape, dtype, device or layout is not taken. A t outside the table gives NaN.
    """
    N, _, _, _ = checks.image_shape("images", images)
    shared = example_arguments(images, images, t, table, key, sample_index, flip)
    checks.check_dtype("dtype", dtype, checks.FLOATS)
    grid = checks.grid("images", images, N * shared["tiles"])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x_t = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=layout)
    if N:
        with torch.cuda.device_of(images):
            q_sample_kernel[grid](x_t_ptr=x_t, NHWC=checks.is_nhwc(x_t=x_t), **shared)
    return x_t
