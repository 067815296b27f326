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
from ddpm_fast.kernels.philox import FLIP, TRAINING, first_word, load_key, load_word
from ddpm_fast.kernels.pixel_tiles import load_column, load_x_start, tile_normals, tile_pixels, tile_places

# The columns of `ddpm_fast.schedule.TrainingTable`, which kernels may not import; a test holds them together.
COLUMN_A = tl.constexpr(0)
COLUMN_B = tl.constexpr(1)
COLUMNS = tl.constexpr(5)


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
    image = tl.program_id(0) // tiles
    first_pixel = (tl.program_id(0) % tiles) * BLOCK
    k0, k1 = load_key(key_ptr)
    sample = load_word(sample_index_ptr + image)
    t = tl.load(t_ptr + image)
    row_ptr = table_ptr + t * COLUMNS
    inside = (t >= 0) & (t < T)
    a = load_column(row_ptr, COLUMN_A, inside)
    b = load_column(row_ptr, COLUMN_B, inside)
    flipped = first_word(sample, FLIP, k0, k1) >= 0x80000000 if MIRROR else False
    for group in range((C + 3) // 4):
        pixel, channel, offset, real = tile_places(first_pixel, group, HW, C, NHWC, BLOCK)
        x_start = load_x_start(
            images_ptr, image, pixel, channel, offset, real, flipped, HW, W, C, IMAGES_NHWC, NHWC, MIRROR
        )
        eps = tile_normals(first_pixel, group, sample, 0, TRAINING, k0, k1, C, NHWC, BLOCK)
        x_t = a * x_start + b * eps
        tl.store(x_t_ptr + image.to(tl.int64) * HW * C + offset, x_t, mask=real)


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
    N, C, H, W = checks.image_shape("images", images)
    device = images.device
    checks.check("images", images, (N, C, H, W), (torch.uint8, *checks.FLOATS), device)
    checks.check_dense("t", t, (N,), (torch.int64,), device)
    checks.check_dense("table", table, (len(table), COLUMNS.value), (torch.float32,), device)
    checks.check_address(key, sample_index, N, device)
    checks.check_dtype("dtype", dtype, checks.FLOATS)
    images_nhwc = checks.is_nhwc(images=images)
    BLOCK, warps = tile_pixels(C, H * W)
    tiles = triton.cdiv(H * W, BLOCK)
    grid = checks.grid("images", images, N * tiles)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x_t = torch.empty((N, C, H, W), dtype=dtype, device=device, memory_format=layout)
    if N == 0:
        return x_t
    with torch.cuda.device_of(images):
        q_sample_kernel[grid](
            x_t_ptr=x_t,
            images_ptr=images,
            t_ptr=t,
            table_ptr=table,
            key_ptr=key,
            sample_index_ptr=sample_index,
            HW=H * W,
            W=W,
            T=len(table),
            tiles=tiles,
            C=C,
            MIRROR=flip,
            NHWC=checks.is_nhwc(x_t=x_t),
            IMAGES_NHWC=images_nhwc,
            BLOCK=BLOCK,
            num_warps=warps,
        )
    return x_t
