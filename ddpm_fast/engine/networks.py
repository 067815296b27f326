"""A U-Net as a sampling loop runs it: a copy of it, and what its blocks are told in each step.

Shapes: N images, K steps, D width of the embedding, S the U-Net's time shifts.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.model.unet import UNet


def sampling_copy(unet: UNet, dtype: torch.dtype) -> UNet:
    """Return a copy of the U-Net to sample with: convolutions and products in `dtype`, norms' parameters in float32."""
    unet = copy.deepcopy(unet).freeze()
    for parameter in unet.low_precision_parameters().values():
        parameter.data = parameter.data.to(dtype)
    return unet


class StepFunctions(NamedTuple):
    """What a step calls, compiled or not."""

    denoise: Callable[[Tensor, Tensor], Tensor]
    reverse_step: Callable[..., None]
    guide: Callable[[Tensor, Tensor], Tensor]
    """The guiding U-Net's own denoise."""
    guided: Callable[[Tensor, Tensor, Tensor], Tensor]


class SampledNetwork:
    """A U-Net's copy, and the shifts of all rows of a table.

    t is known in advance, so the whole time-embedding path is computed once for all rows, in float32. With labels too
    it would take K * classes * S numbers (300 MB for cifar10's 10 classes): there, rows keep their embeddings, and the
    step adds each image's label's and projects the sum, which is a ten-thousandth of the network's FLOPs.
    """

    def __init__(self, unet: UNet, t: Tensor, dtype: torch.dtype) -> None:
        """Copy a U-Net for a loop in `dtype` whose rows are of timesteps t [K]."""
        self.unet, self.t, self.dtype = sampling_copy(unet, dtype), t, dtype
        self.told = self._told(unet)

    @torch.no_grad()
    def _told(self, unet: UNet) -> tuple[Tensor, ...]:
        """Return the rows' shifts [K, S]; or embeddings of rows [K, D] and labels, and the projection [S, D], [S]."""
        if unet.class_embedding is None:
            return (unet.time_shifts(self.t).to(self.dtype),)
        weight, bias, conv_bias = unet.projection()
        embeddings = unet.embed_time(self.t)
        return embeddings, unet.class_embedding.weight.detach().clone(), weight, bias + conv_bias

    @torch.no_grad()
    def load_weights(self, unet: UNet) -> None:
        """Compute with another U-Net's weights from now on, at the same places in memory."""
        for own, new in zip(self.unet.parameters(), sampling_copy(unet, self.dtype).parameters(), strict=True):
            own.copy_(new)
        for own, new in zip(self.told, self._told(unet), strict=True):
            own.copy_(new)

    def shifts(self, step: Tensor, labels: Tensor) -> Tensor:
        """Return the shifts [N, S] of a row, given its number [1], for images of these labels [N]."""
        row = self.told[0].index_select(0, step).expand(len(labels), -1)
        if len(self.told) == 1:
            return row
        _, of_labels, weight, bias = self.told
        return F.linear(F.silu(row + of_labels.index_select(0, labels)), weight, bias).to(self.dtype)
