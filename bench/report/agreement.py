"""Whether captured, compiled and eager loops with and without kernels make the same images.

Two loops that are both right still differ by rounding, and K steps of a network carry that on. How far is measured as
well: from the eager reference in the loop's own precision to the same in a higher one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bench.report.sizes import Sampling
from bench.report.workbench import Row, Workbench
from bench.work.scenarios import CONFIGURATIONS, Variant, default_variant
from ddpm_fast.config import SamplerConfig
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed
from ddpm_fast.diffusion.samplers import SamplerTable, sampler_table
from ddpm_fast.engine.execution import choose_tf32
from ddpm_fast.engine.sampling import GRAPH_STEPS, Loop
from ddpm_fast.engine.trainer import new_unet
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import choose_ops

STEPS = GRAPH_STEPS + 3
"""So that a captured loop replays its graph of many steps and its graph of one."""
ALLOWED = 2.0
"""Times the difference by rounding alone: either side has its own rounding."""

REFERENCE = Variant(kernels=False, mode="eager")


class Made(NamedTuple):
    """A loop's images [N, C, H, W] in float64, and what made them."""

    variant: Variant
    dtype: torch.dtype
    images: Tensor


@torch.no_grad()
def hide_nothing(unet: UNet) -> UNet:
    """Draw weights of which every one matters: those that training starts from make a network that returns zeros."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        values = torch.randn(parameter.shape, generator=generator) * spread
        parameter.copy_(values + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return unet


def _make(unet: UNet, table: SamplerTable, size: Sampling, variant: Variant, dtype: torch.dtype) -> Made:
    ops = choose_ops(variant.kernels, unet.conv_in.weight.device)
    loop = Loop(unet.use(ops), table, dtype, variant.execution)
    address = NoiseAddress(key_from_seed(0, loop.device), torch.arange(size.batch, device=loop.device))
    return Made(variant, dtype, loop.run(address).double())


def _difference(one: Made, other: Made) -> float:
    return float((one.images - other.images).norm() / other.images.norm())


def agreement(bench: Workbench, size: Sampling) -> list[Row]:
    """Compare the loops that a device offers with the eager reference, image by image.

    Raises:
        MathematicsError: a captured loop's own comparison with the eager one failed.
    """
    choose_tf32("fp32")  # the measure of rounding is a float32 loop on a GPU
    config, default = CONFIGURATIONS[size.configuration], default_variant(bench.device)
    unet, table = (
        hide_nothing(new_unet(config, bench.device)),
        sampler_table(config.diffusion, SamplerConfig(steps=STEPS)),
    )
    higher = torch.float64 if bench.dtype == torch.float32 else torch.float32
    reference = _make(unet, table, size, REFERENCE, bench.dtype)
    rounding = _difference(reference, _make(unet, table, size, REFERENCE, higher))
    rows = []
    for variant in dict.fromkeys([default, Variant(default.kernels, "eager")]):
        made = _make(unet, table, size, variant, bench.dtype)
        difference = _difference(made, reference)
        row: Row = {"configuration": size.configuration, "images": size.batch, "steps": STEPS, "variant": str(variant)}
        row |= {"dtype": str(bench.dtype).removeprefix("torch."), "against": str(REFERENCE), "rounding": rounding}
        row |= {"difference": difference, "largest": float((made.images - reference.images).abs().max())}
        rows.append(row | {"agrees": difference <= ALLOWED * rounding, "own_check": variant.mode == "captured"})
    return rows
