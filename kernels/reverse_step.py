"""reverse_step: one row of a sampler's table, in place (Ho et al. 2020, Algorithm 2, line 4; `ddpm_fast.samplers`).

    x0 = p*x - q*out            (clipped to [-1, 1] if asked)
    x  = u*x0 + v*x + e*out + w*x0_prev + s*z

Layout: x, out, x0 and model_input all NHWC or all NCHW; a program owns a tile of one image (`pixel_tiles`). Arithmetic
in float32, in which x and x0 are kept. The row is looked up by the step in device memory, so a captured graph runs
every step. Bytes moved: x and out read, x written; x0 read and written and model_input written where they are given.
In a row with s = 0 no noise is made. Deterministic: no sums. Not yet timed on a GPU.
Shapes: N images, C channels, H x W pixels, K steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels import checks
from ddpm_fast.kernels.philox import SAMPLING, load_key, load_word
from ddpm_fast.kernels.pixel_tiles import load_column, tile_normals, tile_pixels, tile_places

# The columns of `ddpm_fast.samplers.Row`, which kernels may not import; a test holds them together.
COLUMN_P = tl.constexpr(1)
COLUMN_Q = tl.constexpr(2)
COLUMN_U = tl.constexpr(3)
COLUMN_V = tl.constexpr(4)
COLUMN_E = tl.constexpr(5)
COLUMN_W = tl.constexpr(6)
COLUMN_S = tl.constexpr(7)
COLUMNS = tl.constexpr(8)


@triton.jit
def reverse_step_kernel(
    x_ptr,  # [N, C, H, W] float32, read and written
    out_ptr,  # [N, C, H, W]
    x0_ptr,  # [N, C, H, W] float32, read and written, or None
    model_input_ptr,  # [N, C, H, W], written, or None
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
    NHWC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0) // tiles
    first_pixel = (tl.program_id(0) % tiles) * BLOCK
    step = tl.load(step_ptr)
    row_ptr = rows_ptr + step * COLUMNS
    inside = (step >= 0) & (step < K)
    p = load_column(row_ptr, COLUMN_P, inside)
    q = load_column(row_ptr, COLUMN_Q, inside)
    u = load_column(row_ptr, COLUMN_U, inside)
    v = load_column(row_ptr, COLUMN_V, inside)
    e = load_column(row_ptr, COLUMN_E, inside)
    w = load_column(row_ptr, COLUMN_W, inside)
    s = load_column(row_ptr, COLUMN_S, inside)
    for group in range((C + 3) // 4):
        _, _, offset, real = tile_places(first_pixel, group, HW, C, NHWC, BLOCK)
        place = image.to(tl.int64) * HW * C + offset
        x = tl.load(x_ptr + place, mask=real, other=0.0)
        out = tl.load(out_ptr + place, mask=real, other=0.0).to(tl.float32)
        x0 = p * x - q * out
        if CLIP:
            x0 = tl.clamp(x0, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN must not look like a pixel
        x = u * x0 + v * x + e * out
        if x0_ptr is not None:
            x += w * tl.load(x0_ptr + place, mask=real, other=0.0)
        if NOISY:  # noqa: SIM102 - this is known when compiling, s is not
            if s != 0.0:
                k0, k1 = load_key(key_ptr)
                sample = load_word(sample_index_ptr + image)
                c2 = (step + 1).to(tl.uint32)
                x += s * tile_normals(first_pixel, group, sample, c2, SAMPLING, k0, k1, C, NHWC, BLOCK)
        # Beside a 16-bit tensor a thread reads 8 neighbours but writes 4: another's, which that must have read before.
        tl.debug_barrier()
        if x0_ptr is not None:
            tl.store(x0_ptr + place, x0, mask=real)
        tl.store(x_ptr + place, x, mask=real)
        if model_input_ptr is not None:
            tl.store(model_input_ptr + place, x, mask=real)


def reverse_step(
    x: Tensor,
    out: Tensor,
    rows: Tensor,
    step: Tensor,
    key: Tensor,
    sample_index: Tensor,
    *,
    clip: bool,
    noisy: bool,
    x0: Tensor | None = None,
    model_input: Tensor | None = None,
) -> None:
    """Take one row of a sampler's table, in place; arguments as `ddpm_fast.reference.reverse_step`, rows float32.

    Raises:
        ValueError: a shape, dtype, device or layout is not taken. A step outside the table gives NaN.
    """
    N, C, H, W = checks.image_shape("x", x)
    checks.check("x", x, (N, C, H, W), (torch.float32,), x.device)
    checks.check("out", out, (N, C, H, W), checks.FLOATS, x.device)
    if x0 is not None:
        checks.check("x0", x0, (N, C, H, W), (torch.float32,), x.device)
    if model_input is not None:
        checks.check("model_input", model_input, (N, C, H, W), checks.FLOATS, x.device)
    checks.check_dense("rows", rows, (len(rows), COLUMNS.value), (torch.float32,), x.device)
    checks.check_dense("step", step, (1,), (torch.int64,), x.device)
    checks.check_address(key, sample_index, N, x.device)
    nhwc = checks.is_nhwc(x=x, out=out, x0=x0, model_input=model_input)
    BLOCK, warps = tile_pixels(C, H * W)
    tiles = triton.cdiv(H * W, BLOCK)
    grid = checks.grid("x", x, N * tiles)
    if N == 0:
        return
    with torch.cuda.device_of(x):
        reverse_step_kernel[grid](
            x_ptr=x,
            out_ptr=out,
            x0_ptr=x0,
            model_input_ptr=model_input,
            rows_ptr=rows,
            step_ptr=step,
            key_ptr=key,
            sample_index_ptr=sample_index,
            HW=H * W,
            K=len(rows),
            tiles=tiles,
            C=C,
            CLIP=clip,
            NOISY=noisy,
            NHWC=nhwc,
            BLOCK=BLOCK,
            num_warps=warps,
        )
