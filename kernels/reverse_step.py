"""reverse_step: one row of a sampler's table, in place (Ho et al. 2020, Algorithm 2, line 4).

The equation and its coefficients, the columns of the table, are at the top of `ddpm_fast.diffusion.samplers`.
Layout: x, prediction, x0 and model_input NHWC; a program owns a tile of one image (`pixel_tiles`). Arithmetic in
float32, in which x and x0 are kept. The row is looked up by the step in device memory, so a captured graph runs every
step. Bytes moved: x and prediction read, x written; x0 read and written and model_input written where they are given.
In a row without noise none is made. Deterministic: no sums. Not yet timed on a GPU.
Shapes: N images, C channels, H x W pixels, K steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.constants import SAMPLER_COLUMN
from ddpm_fast.kernels import checks
from ddpm_fast.kernels.philox import SAMPLING, load_key, load_word
from ddpm_fast.kernels.pixel_tiles import load_column, tile_arguments, tile_normals, tile_places

X0_FROM_X = tl.constexpr(SAMPLER_COLUMN.x0_from_x)
X0_FROM_PREDICTION = tl.constexpr(SAMPLER_COLUMN.x0_from_prediction)
NEXT_FROM_X0 = tl.constexpr(SAMPLER_COLUMN.next_from_x0)
NEXT_FROM_X = tl.constexpr(SAMPLER_COLUMN.next_from_x)
NEXT_FROM_PREDICTION = tl.constexpr(SAMPLER_COLUMN.next_from_prediction)
NEXT_FROM_X0_PREV = tl.constexpr(SAMPLER_COLUMN.next_from_x0_prev)
NOISE = tl.constexpr(SAMPLER_COLUMN.noise)
COLUMNS = tl.constexpr(len(SAMPLER_COLUMN))


@triton.jit
def reverse_step_kernel(
    x_ptr,  # [N, H, W, C] float32, read and written
    prediction_ptr,  # [N, H, W, C]
    x0_ptr,  # [N, H, W, C] float32, read and written, or None
    model_input_ptr,  # [N, H, W, C], written, or None
    rows_ptr,  # [K, 8] float32
    step_ptr,  # [1] int64
    key_ptr,  # [2] int64
    sample_index_ptr,  # [N] int64
    HW,
    K,
    tiles,  # of an image
    C: tl.constexpr,
    CLIP: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0) // tiles
    first_pixel = (tl.program_id(0) % tiles) * BLOCK
    step = tl.load(step_ptr)
    row_ptr = rows_ptr + step * COLUMNS
    inside = (step >= 0) & (step < K)
    x0_from_x = load_column(row_ptr, X0_FROM_X, inside)
    x0_from_prediction = load_column(row_ptr, X0_FROM_PREDICTION, inside)
    next_from_x0 = load_column(row_ptr, NEXT_FROM_X0, inside)
    next_from_x = load_column(row_ptr, NEXT_FROM_X, inside)
    next_from_prediction = load_column(row_ptr, NEXT_FROM_PREDICTION, inside)
    next_from_x0_prev = load_column(row_ptr, NEXT_FROM_X0_PREV, inside)
    noise = load_column(row_ptr, NOISE, inside)

    _, offset, real = tile_places(first_pixel, HW, C, BLOCK)
    place = image.to(tl.int64) * HW * C + offset
    x = tl.load(x_ptr + place, mask=real, other=0.0)
    prediction = tl.load(prediction_ptr + place, mask=real, other=0.0).to(tl.float32)
    x0 = x0_from_x * x - x0_from_prediction * prediction
    if CLIP:
        x0 = tl.clamp(x0, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN must not look like a pixel
    x = next_from_x0 * x0 + next_from_x * x + next_from_prediction * prediction
    if x0_ptr is not None:
        x += next_from_x0_prev * tl.load(x0_ptr + place, mask=real, other=0.0)
    if NOISY:  # noqa: SIM102 - this is known when compiling, the row's noise is not
        if noise != 0.0:
            k0, k1 = load_key(key_ptr)
            sample = load_word(sample_index_ptr + image)
            x += noise * tile_normals(first_pixel, sample, (step + 1).to(tl.uint32), SAMPLING, k0, k1, C, BLOCK)
    # With 16-bit tensors a thread loads 8 neighbours but stores 4: wait until all have loaded what others will store.
    tl.debug_barrier()
    if x0_ptr is not None:
        tl.store(x0_ptr + place, x0, mask=real)
    tl.store(x_ptr + place, x, mask=real)
    if model_input_ptr is not None:
        tl.store(model_input_ptr + place, x, mask=real)


def reverse_step(
    x: Tensor,
    prediction: Tensor,
    rows: Tensor,
    step: Tensor,
    key: Tensor,
    sample_index: Tensor,
    x0: Tensor | None,
    model_input: Tensor | None,
    *,
    clip: bool,
    noisy: bool,
) -> None:
    """Take one row of a sampler's table, in place; arguments as `ddpm_fast.ops.reference.reverse_step`, rows float32.

    Raises:
        ValueError: a shape, dtype, device or layout is not taken. A step outside the table gives NaN.
    """
    tiles, shape, device = tile_arguments("x", x), x.shape, x.device
    checks.check_images("x", x, shape, (torch.float32,), device)
    checks.check_images("prediction", prediction, shape, checks.FLOATS, device)
    if x0 is not None:
        checks.check_images("x0", x0, shape, (torch.float32,), device)
    if model_input is not None:
        checks.check_images("model_input", model_input, shape, checks.FLOATS, device)
    checks.check_dense("rows", rows, (len(rows), COLUMNS.value), (torch.float32,), device)
    checks.check_dense("step", step, (1,), (torch.int64,), device)
    checks.check_address(key, sample_index, len(x), device)
    grid = checks.grid("x", x, len(x) * tiles["tiles"])
    if len(x) == 0:
        return
    with torch.cuda.device_of(x):
        reverse_step_kernel[grid](
            x_ptr=x,
            prediction_ptr=prediction,
            x0_ptr=x0,
            model_input_ptr=model_input,
            rows_ptr=rows,
            step_ptr=step,
            key_ptr=key,
            sample_index_ptr=sample_index,
            K=len(rows),
            CLIP=clip,
            NOISY=noisy,
            **tiles,
        )
