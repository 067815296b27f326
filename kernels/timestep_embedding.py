"""timestep_embedding: sines, then cosines, of t * exp(-ln(10000) * i / (dim / 2 - 1)) (Ho et al. 2020, Appendix B).

The angle is taken in float64 and reduced to a quarter turn there; sine and cosine follow by float32 polynomials. So the
error is 2e-7 at any t, where float32 angles alone cost 6e-5 at t = 1000. It is a few thousand angles per call: float64
costs nothing that can be seen, even where it runs at 1/64 of float32's rate.
Layout: [N, dim] row by row. Bytes moved: 8 read and dim * 2 or 4 written a timestep. Not yet timed on a GPU.
Shapes: N timesteps (of a batch, or of a whole table of steps), half = dim / 2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels import checks
from ddpm_fast.kernels.philox import rotate_quadrants, sin_cos_octant

BLOCK = tl.constexpr(512)  # angles per program
_TWO_PI = tl.constexpr(2 * math.pi)
_DECAY = tl.constexpr(-math.log(10000.0))


@triton.jit
def timestep_embedding_kernel(
    embedding_ptr,  # [N, 2 * half]
    t_ptr,  # [N] integer or float
    N,
    half,
):
    angle_number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, i = angle_number // half, angle_number % half
    real = row < N
    t = tl.load(t_ptr + row, mask=real, other=0).to(tl.float64)
    turns = t * (tl.exp(i.to(tl.float64) * _DECAY / tl.maximum(half - 1, 1).to(tl.float64)) / _TWO_PI)
    quadrants = tl.floor(turns * 4.0 + 0.5)
    rest = (turns - quadrants * 0.25) * _TWO_PI
    sine, cosine = sin_cos_octant(rest.to(tl.float32))
    sine, cosine = rotate_quadrants(sine, cosine, (quadrants.to(tl.int64) & 3).to(tl.int32))
    place = embedding_ptr + row * 2 * half + i
    tl.store(place, sine, mask=real)
    tl.store(place + half, cosine, mask=real)


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embed timesteps as sinusoids; arguments and result as `ddpm_fast.reference.timestep_embedding`.

    Raises:
        ValueError: dim is odd or below 2, or a shape, dtype or layout is not taken.
    """
    checks.check_device("t", t)
    checks.check_dense("t", t, (t.numel(),), (torch.int64, torch.int32, *checks.FLOATS), t.device)
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}: it takes an even number from 2")
    checks.check_dtype("dtype", dtype, checks.FLOATS)
    grid = checks.grid("t", t, triton.cdiv(len(t) * dim // 2, BLOCK.value))
    embedding = torch.empty((len(t), dim), dtype=dtype, device=t.device)
    if len(t):
        with torch.cuda.device_of(t):
            timestep_embedding_kernel[grid](embedding_ptr=embedding, t_ptr=t, N=len(t), half=dim // 2)
    return embedding
