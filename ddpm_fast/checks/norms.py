"""The GroupNorms of a U-Net as it calls them, in training and in sampling with kernels."""

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ddpm_fast.config import UNetConfig
from ddpm_fast.diffusion.noise import NoiseAddress
from ddpm_fast.model.blocks import FusedGroupNorm, ResidualGroupNorm
from ddpm_fast.model.sums import Sum, value_of
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import REFERENCE


class Norm(NamedTuple):
    """A GroupNorm of a U-Net as it is called."""

    channels: int
    height: int
    width: int
    groups: int
    silu: bool
    shift: bool
    dropout: float
    residual: bool
    """Whether what is normalised goes on to a residual connection as well."""
    added: bool = False
    """Whether it is a sum of two maps."""
    beside: int = 0
    """Of the channels, how many lie in a map of their own: those of a skip connection."""


def norms(config: UNetConfig, sampling: bool = False) -> Counter[Norm]:
    """Count the different GroupNorms of a U-Net, in forward order, by running it without data.

    Args:
        config: the U-Net's.
        sampling: as it is called in sampling with kernels; else in training.
    """
    found: Counter[Norm] = Counter()

    def look(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, FusedGroupNorm)
        x, *rest = arguments
        shift, dropout, skip, residual = None, None, None, isinstance(module, ResidualGroupNorm)
        if residual:
            (skip,) = rest or [None]
        else:
            shift, dropout = (*rest, None, None)[:2]
        terms = x if isinstance(x, Sum) else Sum(x)
        shift = terms.shift if shift is None else shift
        beside, probability = (
            0 if skip is None else value_of(skip).shape[1],
            0.0 if dropout is None else dropout.probability,
        )
        _, channels, height, width = terms.x.shape
        options = module.groups, module.silu, shift is not None, probability, residual, terms.added is not None, beside
        found[Norm(channels + beside, height, width, *options)] += 1

    with torch.device("meta"):
        unet = UNet(config)
        if sampling:
            unet.use(replace(REFERENCE, fused=True)).freeze()
        for module in unet.modules():
            if isinstance(module, FusedGroupNorm):
                module.register_forward_pre_hook(look)
        one = torch.zeros(1, dtype=torch.int64)
        x = torch.zeros(1, config.image_channels, config.height, config.width)
        unet(x, one, None if sampling else NoiseAddress(torch.zeros(2, dtype=torch.int64), one))
    return found
