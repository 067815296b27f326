"""noise_mse: weight[t] * mean((prediction - target_eps[t] * eps - target_x_start[t] * x_start)^2) of each image.

That is the loss of Ho et al. 2020, Eq. 14, and its gradient.
Layout: prediction and images NHWC; a program owns a tile of one image (`pixel_tiles`). Arithmetic and sums in float32:
a tile's sum, then an image's tiles, both in a fixed order and without atomics, so two runs agree bit for bit. Nothing
is kept for the backward pass, which makes eps and x_start again.
Bytes moved: forward reads prediction and images once and writes 4 bytes per tile; backward reads them again and writes
the gradient once. Not yet timed on a GPU.
Shapes: N images, C channels, H x W pixels, T timesteps, P tiles of an image.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.constants import TRAINING_COLUMN
from ddpm_fast.kernels import checks
from ddpm_fast.kernels.pixel_tiles import load_column
from ddpm_fast.kernels.training_tiles import COLUMNS, example_arguments, load_example, locate_example

TARGET_EPS = tl.constexpr(TRAINING_COLUMN.target_eps)
TARGET_X_START = tl.constexpr(TRAINING_COLUMN.target_x_start)
WEIGHT = tl.constexpr(TRAINING_COLUMN.weight)
PARTIALS = tl.constexpr(256)  # of an image, added at once


@triton.jit
def tile_difference(
    prediction_ptr, images_ptr, image, row_ptr, inside, first_pixel, noise, HW, W,
    C: tl.constexpr, MIRROR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return prediction - target over a tile, 0 outside the image, with the places' offsets and mask."""
    target_eps = load_column(row_ptr, TARGET_EPS, inside)
    target_x_start = load_column(row_ptr, TARGET_X_START, inside)
    x_start, eps, place, real = load_example(images_ptr, image, first_pixel, noise, HW, W, C, MIRROR, BLOCK)
    prediction = tl.load(prediction_ptr + place, mask=real, other=0.0).to(tl.float32)
    target = target_eps * eps + target_x_start * x_start
    return tl.where(real, prediction - target, 0.0), place, real


@triton.jit
def noise_mse_kernel(
    partial_ptr,  # [N, P] float32: sums of squares
    prediction_ptr,  # [N, H, W, C]
    images_ptr,  # [N, H, W, C] uint8 or float
    t_ptr,  # [N] int64
    table_ptr,  # [T, 5] float32
    key_ptr,  # [2] int64
    sample_index_ptr,  # [N] int64
    HW,
    W,
    T,
    tiles,  # P
    C: tl.constexpr,
    MIRROR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, first_pixel, row_ptr, inside, noise = locate_example(
        t_ptr, table_ptr, key_ptr, sample_index_ptr, T, tiles, MIRROR, BLOCK
    )
    difference, _, _ = tile_difference(
        prediction_ptr, images_ptr, image, row_ptr, inside, first_pixel, noise, HW, W, C, MIRROR, BLOCK
    )
    tl.store(partial_ptr + tl.program_id(0), tl.sum(difference * difference))


@triton.jit
def noise_mse_mean_kernel(
    loss_ptr,  # [N] float32
    partial_ptr,  # [N, P] float32
    t_ptr,  # [N] int64
    table_ptr,  # [T, 5] float32
    elements,  # C * H * W
    T,
    tiles,  # P
):
    image = tl.program_id(0)
    t = tl.load(t_ptr + image)
    weight = load_column(table_ptr + t * COLUMNS, WEIGHT, (t >= 0) & (t < T))
    total = 0.0
    for first in range(0, tiles, PARTIALS):
        tile = first + tl.arange(0, PARTIALS)
        partial = tl.load(partial_ptr + image.to(tl.int64) * tiles + tile, mask=tile < tiles, other=0.0)
        total += tl.sum(partial)
    tl.store(loss_ptr + image, weight * (total / elements))


@triton.jit
def noise_mse_backward_kernel(
    grad_prediction_ptr,  # [N, H, W, C] in prediction's dtype
    grad_ptr,  # [N] float32
    prediction_ptr,  # [N, H, W, C]
    images_ptr,  # [N, H, W, C] uint8 or float
    t_ptr,  # [N] int64
    table_ptr,  # [T, 5] float32
    key_ptr,  # [2] int64
    sample_index_ptr,  # [N] int64
    HW,
    W,
    elements,  # C * H * W
    T,
    tiles,  # P
    C: tl.constexpr,
    MIRROR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, first_pixel, row_ptr, inside, noise = locate_example(
        t_ptr, table_ptr, key_ptr, sample_index_ptr, T, tiles, MIRROR, BLOCK
    )
    scale = 2.0 * tl.load(grad_ptr + image) * load_column(row_ptr, WEIGHT, inside) / elements
    difference, place, real = tile_difference(
        prediction_ptr, images_ptr, image, row_ptr, inside, first_pixel, noise, HW, W, C, MIRROR, BLOCK
    )
    tl.store(grad_prediction_ptr + place, scale * difference, mask=real)


def arguments(
    prediction: Tensor, images: Tensor, t: Tensor, table: Tensor, key: Tensor, sample_index: Tensor, flip: bool
) -> dict[str, Any]:
    """Check what forward and backward share, and return it as the kernels' arguments.

    Raises:
        ValueError: a shape, dtype, device or layout is not taken.
    """
    shared = example_arguments(images, t, table, key, sample_index, flip)
    checks.check_images("prediction", prediction, images.shape, checks.FLOATS, images.device)
    return {"prediction_ptr": prediction, **shared}


def noise_mse(
    prediction: Tensor,
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    *,
    flip: bool = False,
) -> Tensor:
    """Compare a prediction with its target, made again; arguments as `ddpm_fast.ops.reference.noise_mse`.

    Returns:
        [N] float32.

    Raises:
        ValueError: a shape, dtype, device or layout is not taken. A t outside the table gives NaN.
    """
    shared = arguments(prediction, images, t, table, key, sample_index, flip)
    N, tiles = len(prediction), shared["tiles"]
    grid = checks.grid("prediction", prediction, N * tiles)
    loss = torch.empty(N, dtype=torch.float32, device=prediction.device)
    partial = torch.empty((N, tiles), dtype=torch.float32, device=prediction.device)
    if N == 0:
        return loss
    with torch.cuda.device_of(prediction):
        noise_mse_kernel[grid](partial_ptr=partial, **shared)
        noise_mse_mean_kernel[(N,)](
            loss_ptr=loss,
            partial_ptr=partial,
            t_ptr=t,
            table_ptr=table,
            elements=prediction[0].numel(),
            T=len(table),
            tiles=tiles,
            num_warps=1,
        )
    return loss


def noise_mse_backward(
    grad: Tensor,
    prediction: Tensor,
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    *,
    flip: bool = False,
) -> Tensor:
    """Return the gradient of `noise_mse` by prediction, in prediction's dtype, NHWC.

    Args:
        grad: [N] float32, the gradient by each image's loss.
        prediction, images, t, table, key, sample_index, flip: as in the forward pass.

    Raises:
        ValueError: a shape, dtype, device or layout is not taken.
    """
    shared = arguments(prediction, images, t, table, key, sample_index, flip)
    N = len(prediction)
    checks.check_dense("grad", grad, (N,), (torch.float32,), prediction.device)
    grid = checks.grid("prediction", prediction, N * shared["tiles"])
    grad_prediction = torch.empty_like(prediction, memory_format=torch.channels_last)
    if N:
        with torch.cuda.device_of(prediction):
            noise_mse_backward_kernel[grid](
                grad_prediction_ptr=grad_prediction, grad_ptr=grad, elements=prediction[0].numel(), **shared
            )
    return grad_prediction
