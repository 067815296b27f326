"""Are the initial weights those of the paper's code: Xavier's uniform ones, zero biases, and outputs near zero?"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_fast import textbook
from ddpm_fast.checks.chance import RARE, of_sigmas
from ddpm_fast.checks.draws import OTHER_SEEDS
from ddpm_fast.checks.results import CheckResult, Verdict, judged
from ddpm_fast.config import Config, UNetConfig, with_training
from ddpm_fast.engine.trainer import new_unet
from ddpm_fast.model.unet import UNet

UNET, TRAINER = "ddpm_fast/model/unet.py", "ddpm_fast/engine/trainer.py"
NEAR_ZERO = ("conv2.weight", "to_out.0.weight", "conv_out.weight")
"""Layers that begin at 1e-5 of the others: what a residual branch adds, and the output."""
SMALL = UNetConfig(1, 4, 4, 4, (1,), 1, (), groups=2)


def check_weights(unet: UNet, config: Config) -> Iterator[CheckResult]:
    """Check a U-Net's initial weights, and that they follow from the seed.

    Args:
        unet: as `engine.trainer.new_unet` made it, neither trained nor perturbed.
        config: the run's.
    """
    with torch.device("meta"):
        known = {name: tuple(p.shape) for name, p in textbook.UNet(unet.config).named_parameters()}
    found = dict(unet.named_parameters())
    foreign = sorted(n for n, p in found.items() if known.get(n) != tuple(p.shape)) + sorted(known.keys() - found)
    name, text = "the U-Net has the textbook's layers", f"{len(foreign)} differ, e.g. {foreign[0]}" if foreign else ""
    verdict = judged(not foreign, Verdict.CHANGED)
    yield CheckResult("weights", name, verdict, f"{len(known)} parameters", text or f"{len(known)}", UNET)
    ours = {name: found[name].detach() for name in known if name not in foreign}
    odd = [words for name, weight in ours.items() if (words := _oddity(name, weight, len(ours)))]
    name, expected = "initial weights are Xavier's", "uniform, near zero where a branch ends; biases 0, norms 1"
    text = f"{len(odd)} layer{'s' * (len(odd) > 1)} otherwise, e.g. {odd[0]}" if odd else "just that"
    yield CheckResult("weights", name, judged(not odd), expected, text, UNET)
    yield _check_repetition(ours)
    yield _check_seed(config, unet.conv_in.weight.device)


def _bound(name: str, weight: Tensor) -> float:
    """Return the largest value that Xavier's uniform distribution allows (Glorot and Bengio 2010, Equation 16)."""
    fans = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
    return _gain(name) * math.sqrt(6 / fans)


def _gain(name: str) -> float:
    """Return the share of Xavier's that a layer begins at."""
    return 1e-5 if name.endswith(NEAR_ZERO) else 1.0


def _oddity(name: str, weight: Tensor, layers: int) -> str:
    """Say what is odd about a layer's initial values, or nothing."""
    if weight.dim() == 1:
        constant = 0.0 if name.endswith("bias") else 1.0
        return "" if bool((weight == constant).all()) else f"{name} is not {constant:.0f}"
    bound, n = _bound(name, weight), weight.numel()
    ratio = float(weight.double().square().mean()) / (bound**2 / 3)
    mean = float(weight.double().mean()) / bound
    largest = float(weight.abs().max()) / bound
    # Of a uniform number in -1..1, the square has mean 1/3 and variance 4/45.
    chance = min(of_sigmas((ratio - 1) / 3 / math.sqrt(4 / 45 / n)), of_sigmas(mean * math.sqrt(3 * n)))
    if largest <= 1 + 1e-6 and chance * layers >= RARE:
        return ""
    gain = _gain(name)
    variance = f"{ratio * gain**2:.2g} times Xavier's variance ({gain**2:g} is right)"
    return f"{name} has {variance}, and at most {largest * gain:.2g} times its bound ({gain:g} is right)"


def _check_repetition(weights: dict[str, Tensor]) -> CheckResult:
    begins = {
        name: tuple((weight.flatten()[:6] / _bound(name, weight)).double().cpu().mul(1e4).round().tolist())
        for name, weight in weights.items()
        if weight.dim() > 1
    }
    repeated = len(begins) - len(set(begins.values()))
    name, found = "no two layers begin alike", f"{repeated} of {len(begins)} repeat another"
    return CheckResult("weights", name, judged(not repeated), f"0 of {len(begins)} repeat another", found, UNET)


def _check_seed(config: Config, device: torch.device) -> CheckResult:
    seed = config.training.seed
    seeds = (seed, seed, *((seed + more) % 2**64 for more in OTHER_SEEDS))
    first, again, *others = (
        new_unet(with_training(replace(config, unet=SMALL), seed=s), device).conv_in.weight for s in seeds
    )
    right = torch.equal(first, again) and not any(torch.equal(first, other) for other in others)
    name, expected = "initial weights follow from the seed", "the same for one seed, others for another"
    found = expected if right else "others for one seed" if not torch.equal(first, again) else "the same for another"
    return CheckResult("weights", name, judged(right), expected, found, TRAINER)
