"""A small trainer that stands in for the run's own: its configuration and data, a few examples, exact arithmetic."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ddpm_fast.config import Config, TrainingConfig, UNetConfig, with_training
from ddpm_fast.engine.trainer import BatchFunction, Trainer
from ddpm_fast.model.unet import UNet

EXAMPLES = 8
"""In a batch of the check, or fewer: see `FLOP`."""
FLOP = 4e9
"""Of one forward pass of a batch, at most; recording and recomputing three steps take some 20 times as long."""
GPU_FLOP = 1e13


def affordable(unet: UNetConfig, limit: float) -> UNetConfig:
    """Return the U-Net, or one of the same kind of no more FLOPs per image: fewer pixels, then fewer channels."""
    while flop_of(unet) > limit and (smaller := _with_fewer_pixels(unet) or _narrower(unet)) is not None:
        unet = smaller
    return unet


def _with_fewer_pixels(unet: UNetConfig) -> UNetConfig | None:
    """Return the U-Net for half the height and width, unless few are left."""
    levels, sides = len(unet.channel_multipliers), (unet.height, unet.width)
    if min(sides) <= 32 or min(sides) >> levels < 2 or any(side % 2**levels for side in sides):
        return None
    attends = tuple(resolution // 2 for resolution in unet.attention_resolutions)
    return replace(unet, height=unet.height // 2, width=unet.width // 2, attention_resolutions=attends)


def _narrower(unet: UNetConfig) -> UNetConfig | None:
    """Return the U-Net of half the channels, as many in a group if that is possible."""
    channels, groups = unet.channels // 2, unet.groups if unet.groups % 2 else unet.groups // 2
    divides = not any(channels * multiplier % groups for multiplier in unet.channel_multipliers)
    if channels % 2 or unet.head_channels % 2 or not divides:
        return None
    return replace(unet, channels=channels, groups=groups, head_channels=unet.head_channels // 2)


@cache
def flop_of(unet: UNetConfig) -> int:
    """Return the FLOPs per image of one forward pass."""
    with torch.device("meta"):
        return UNet(unet).estimate_flop()


def small_trainer(config: Config, batch: BatchFunction, device: torch.device) -> Trainer:
    """Build a trainer of the run's own configuration and data on a few examples per step, in float32, eager.

    A batch stays in parts where the run accumulates: in four or two. The U-Net is the run's own if it is `affordable`.
    """
    limit = GPU_FLOP if device.type == "cuda" else FLOP
    unet = affordable(config.unet, limit / 2)
    examples = max(2, min(EXAMPLES, int(limit / flop_of(unet))) // 2 * 2)
    accumulate = next(parts for parts in (4, 2, 1) if parts <= config.training.accumulate and examples % parts == 0)
    config = with_training(config, batch_size=examples, accumulate=accumulate, precision="fp32")
    config = replace(config, unet=unet)

    def cropped(first: int, n: int) -> tuple[Tensor, ...]:
        images, *rest = batch(first, n)
        return images[:, :, : unet.height, : unet.width], *rest

    return Trainer(config, cropped, device)


@torch.no_grad()
def perturb(unet: UNet, seed: int = 0) -> UNet:
    """Add noise to the weights, in place, so that every branch matters: initially residual ones are 1e-5 of the trunk.

    Each layer keeps the size of what passes through it, so that nothing overflows.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        spread = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        spread = 1.0 if name == "class_embedding.weight" else spread  # whose rows are what passes
        parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return unet


@contextmanager
def exact_float32() -> Iterator[None]:
    """Forbid TF32 for a while."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


def steps_to_check(config: TrainingConfig) -> tuple[int, int, int]:
    """Return the numbers of a run's first step, one in the warm-up, and one late in the run.

    That is half way through the cooldown, or without one long after everything has warmed up.
    """
    middle, warm = max(1, config.warmup_steps // 2), 100 / (1 - config.ema_decay)
    if config.cooldown_steps:  # then nothing is asked for after the last step
        return 0, min(middle, config.steps - 1), config.steps - (config.cooldown_steps + 1) // 2
    return 0, middle, min(int(max(warm, 2 * config.warmup_steps, 1000)), 2**28)
