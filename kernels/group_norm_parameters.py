"""The gradients of GroupNorm's weight and bias, summed over images in a fixed order; see `group_norm_silu_backward`.

Shapes: N image, C channel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PARAMETER_CHANNELS = tl.constexpr(8)  # a memory sector of float32: many programs, each of which waits for memory once
PARAMETER_IMAGES = tl.constexpr(128)  # at a time


@triton.jit
def parameter_gradient_kernel(
    parameter_sums,  # [N, 2, C] float32
    dweight,  # [C]
    dbias,  # [C]
    N,
    C: tl.constexpr,
):
    channel = tl.program_id(0) * PARAMETER_CHANNELS + tl.arange(0, PARAMETER_CHANNELS)
    of_bias, real = tl.program_id(1), channel < C
    terms = tl.zeros([PARAMETER_IMAGES, PARAMETER_CHANNELS], tl.float32)
    for first in range(0, N, PARAMETER_IMAGES):
        image = first + tl.arange(0, PARAMETER_IMAGES)
        row = (2 * image.to(tl.int64) + of_bias) * C
        mask = (image < N)[:, None] & real[None, :]
        terms += tl.load(parameter_sums + row[:, None] + channel[None, :], mask=mask, other=0.0)
    total = tl.sum(terms, axis=0)
    tl.store(dweight + channel, total, mask=real & (of_bias == 0))
    tl.store(dbias + channel, total, mask=real & (of_bias == 1))


def parameter_gradients(parameter_sums: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Sum each image's part [N, 2, C] float32: dweight and dbias [C], like weight and bias."""
    dweight, dbias, (N, _, C) = torch.empty_like(weight), torch.empty_like(bias), parameter_sums.shape
    parameter_gradient_kernel[(triton.cdiv(C, PARAMETER_CHANNELS.value), 2)](
        parameter_sums=parameter_sums, dweight=dweight, dbias=dbias, N=N, C=C
    )
    return dweight, dbias
