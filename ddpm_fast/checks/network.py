"""Is the engine's U-Net the textbook's, block by block, and is its gradient right?

The textbook's blocks are given what the engine's blocks were given, and each result is replaced by the engine's, so
that a fault shows where it is and is not carried on. A result keeps its own gradient, so that one backward pass through
the textbook is right at the engine's values. Shapes: N images, C channels, H x W pixels, T timesteps.
"""

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import textbook
from ddpm_fast.checks.derivatives import find_wrong_gradient
from ddpm_fast.checks.dropout import KeptAsRecorded
from ddpm_fast.checks.recording import TrainingStep, distance
from ddpm_fast.checks.results import CheckResult, Verdict, judged
from ddpm_fast.config import UNetConfig
from ddpm_fast.engine.trainer import Trainer

ENDS = ("", "time_embedding", "conv_in", "conv_norm_out", "conv_out")
UNET, BLOCKS = "ddpm_fast/model/unet.py", "ddpm_fast/model/blocks.py"
TRAINER, FLAT = "ddpm_fast/engine/trainer.py", "ddpm_fast/engine/flat_weights.py"
FLOAT32 = torch.finfo(torch.float32).eps
BLOCK_BOUND = 512 * FLOAT32
"""Relative: blocks were 5e-7 off, by rounding, in all presets on a CPU; a GPU's Winograd convolutions round coarser."""
GRADIENT_BOUND = 4096 * FLOAT32
"""Relative to the block's largest: gradients, through all blocks behind, were 3e-6 off."""


class Difference(NamedTuple):
    """How far one side of a block is from the textbook's, relative to its size."""

    block: str
    side: str
    distance: float
    bound: float


@cache
def watched_modules(config: UNetConfig) -> tuple[str, ...]:
    """Return the names of the modules whose calls are to be recorded."""
    with torch.device("meta"):
        modules = textbook.UNet(config).named_modules()
    return tuple(name for name, module in modules if _is_block(name, module) or isinstance(module, nn.GroupNorm))


def _is_block(name: str, module: nn.Module) -> bool:
    resizes = name.endswith(("downsamplers.0", "upsamplers.0"))
    return name in ENDS or resizes or isinstance(module, textbook.ResBlock | textbook.Attention)


def textbook_unet(config: UNetConfig, weights: Mapping[str, Tensor]) -> textbook.UNet:
    """Return the textbook's U-Net in float64 with these weights.

    Raises:
        RuntimeError: it has other parameters.
    """
    with torch.device("meta"):
        unet = textbook.UNet(config)
    unet.load_state_dict({name: weight.detach().double() for name, weight in weights.items()}, assign=True)
    return unet


class FollowedUNet:
    """The textbook's U-Net in float64 with the engine's weights, run along what the engine was recorded doing."""

    def __init__(self, step: TrainingStep) -> None:
        """Take over the weights.

        Raises:
            RuntimeError: the engine's U-Net has other parameters.
        """
        self.step, self.differences = step, list[Difference]()
        self.sinusoids = torch.empty(0)
        self.unet = textbook_unet(step.config.unet, step.before["model"])
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(name in step.gradients)
        for name, module in self.unet.named_modules():
            if isinstance(module, textbook.ResBlock):
                module.dropout = KeptAsRecorded(step.modules[f"{name}.norm2"])
            if name and _is_block(name, module):
                module.register_forward_pre_hook(partial(self._compare_input, name))
                module.register_forward_hook(partial(self._compare_output, name))

    def run(self) -> Tensor:
        """Predict what the engine predicted: [N, C, H, W] float64."""
        x_t = self.step.told(0, "x").double().requires_grad_()  # behind a frozen layer PyTorch's GroupNorm needs this
        return self.unet(x_t, self.step.told(1, "t"))

    def differing(self) -> list[Difference]:
        """Return the sides of blocks that are not the textbook's, in forward order."""
        return [difference for difference in self.differences if not difference.distance <= difference.bound]

    def sinusoids_are_off(self) -> bool:
        """Return whether the op itself is wrong, for the t that the network was given."""
        told, t = self.step.joined("timestep_embedding", "t"), self.step.told(1, "t")
        return torch.equal(told, t) and distance(self.step.returned("timestep_embedding"), self.sinusoids) > 1e-3

    def shift_is_off(self, name: str) -> bool:
        """Return whether what a ResBlock is told of the timestep differs: the projection, and conv1's bias."""
        block, embedding = self.unet.get_submodule(name), self.step.output("time_embedding")
        shifts = [call.vectors() for call in self.step.modules[name]]
        if not isinstance(block, textbook.ResBlock) or embedding is None or not all(shifts):
            return False
        expected = block.time_emb_proj(F.silu(embedding.double())) + block.conv1.bias
        return distance(torch.cat([vectors[0] for vectors in shifts]), expected) > BLOCK_BOUND

    def _compare_input(self, name: str, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        theirs, own = self.step.input(name), given[0]
        if theirs is None:
            self.differences.append(Difference(name, "call", float("inf"), 0.0))
            return None
        # Sinusoids: an angle of up to T is rounded to eps(float32) of itself.
        bound = FLOAT32 * self.step.config.diffusion.timesteps if name == "time_embedding" else 0.0
        self.sinusoids = own if name == "time_embedding" else self.sinusoids
        self.differences.append(Difference(name, "input", distance(theirs, own), bound + BLOCK_BOUND))
        return (_with_value(own, theirs), *given[1:])

    def _compare_output(self, name: str, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        theirs = self.step.output(name)
        if name == "conv_norm_out" or theirs is None:  # the engine's ends in SiLU: to be seen at conv_out's input
            return output
        self.differences.append(Difference(name, "output", distance(theirs, output), BLOCK_BOUND))
        return _with_value(output, theirs)


def _with_value(own: Tensor, value: Tensor) -> Tensor:
    """Return the value with own's gradient, or own where the shapes differ."""
    return own + (value - own).detach() if value.shape == own.shape else own


def check_network(trainer: Trainer, step: TrainingStep, run: UNetConfig) -> Iterator[CheckResult]:
    """Compare the network's blocks with the textbook's, and its gradient with the textbook's, or finite differences.

    Args:
        trainer: whose step was recorded.
        step: recorded with `watched_modules`, and not the first: a gradient may be left over from the step before.
        run: the run's own U-Net, of which the trainer's may be a reduced one.
    """
    yield _check_arguments(step)
    frozen = [name for name in step.before["model"] if name not in step.gradients]
    if frozen:
        yield _describe_frozen(frozen)
    ours = step.config.unet
    size = "" if ours == run else f" (of {ours.channels} channels at {ours.height}x{ours.width})"
    name = f"the U-Net{size} is the textbook's, block by block"
    try:
        followed = FollowedUNet(step)
    except RuntimeError:
        found, file = _parameters_on_one_side(step)
        yield CheckResult("network", name, Verdict.CHANGED, "diffusers' parameter names", found, file)
        yield find_wrong_gradient(trainer, step)
        return
    prediction = followed.run()
    differing = followed.differing()
    if differing:
        yield _describe(name, followed, differing[0], trainer)
        yield find_wrong_gradient(trainer, step)
        return
    worst = max((d.distance for d in followed.differences if d.block != "time_embedding"), default=0.0)
    expected = f"equal to float32's rounding, {BLOCK_BOUND:.0e}"
    yield CheckResult("network", name, Verdict.RIGHT, expected, f"{worst:.0e}", UNET)
    prediction.backward(torch.cat(step.prediction_gradients).double())
    yield _compare_gradients(step, followed)


def _check_arguments(step: TrainingStep) -> CheckResult:
    x_t, t = step.returned("q_sample"), step.joined("q_sample", "t")
    same_x_t, same_t = distance(step.told(0, "x"), x_t) <= FLOAT32, torch.equal(step.told(1, "t"), t)
    found = "both" if same_x_t and same_t else f"another {'t' if same_x_t else 'x_t'}"
    name, right = "the network is given the x_t and the t that were made", judged(same_x_t and same_t)
    return CheckResult("network", name, right, "both", found, TRAINER)


def _describe_frozen(frozen: list[str]) -> CheckResult:
    found = f"{frozen[0]}" + (f" and {len(frozen) - 1} more" if frozen[1:] else "")
    name, expected = "every parameter learns", "none with requires_grad=False"
    return CheckResult("gradient", name, Verdict.CHANGED, expected, f"{found} frozen", f"{UNET} or {BLOCKS}")


def _parameters_on_one_side(step: TrainingStep) -> tuple[str, str]:
    with torch.device("meta"):
        expected = dict(textbook.UNet(step.config.unet).named_parameters())
    ours = step.before["model"]
    missing = [name for name in expected if name not in ours]
    added = [name for name in ours if name not in expected]
    shaped = [name for name in expected if name in ours and ours[name].shape != expected[name].shape]
    words = [("without ", missing), ("with ", added), ("another shape of ", shaped)]
    found = [
        f"{word}{names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") for word, names in words if names
    ]
    return ", ".join(found), f"{BLOCKS} or {UNET}"


def _describe(name: str, followed: FollowedUNet, first: Difference, trainer: Trainer) -> CheckResult:
    blocks = list(dict.fromkeys(difference.block for difference in followed.differences))
    where = f"block {blocks.index(first.block) + 1} of {len(blocks)}, {first.block}"
    if first.side == "call":
        found = f"{where}: it is never called"
    elif first.distance == float("inf"):
        found = f"{where}: its {first.side} has another shape or is not finite"
    else:
        found = f"{where}: its {first.side} is {first.distance:.1e} off, relative to its size"
    expected = "the textbook's result of the engine's own inputs" if first.side == "output" else "the textbook's input"
    file = UNET if first.side != "output" or first.block in ENDS else BLOCKS
    if first.side == "output" and followed.shift_is_off(first.block):
        file, found = UNET, f"{found}; what the timestep adds differs"
    if first.block == "time_embedding" and first.side == "input" and followed.sinusoids_are_off():
        file = "kernels/timestep_embedding.py" if trainer.unet.ops.fused else "ddpm_fast/ops/reference.py"
    return CheckResult("network", name, Verdict.CHANGED, expected, found, file)


def _compare_gradients(step: TrainingStep, followed: FollowedUNet) -> CheckResult:
    """Compare each parameter's gradient, and name the first one that differs, from the end of the network on."""
    expected = {name: p.grad for name, p in followed.unet.named_parameters() if p.grad is not None}
    order = list(dict.fromkeys(difference.block for difference in followed.differences))
    blocks = {name: next(block for block in order if name.startswith(f"{block}.")) for name in expected}
    scales: dict[str, float] = {}
    for name, gradient in expected.items():  # a bias before a softmax, or a group of one channel, has a gradient of 0
        scales[blocks[name]] = max(scales.get(blocks[name], 0.0), _size(gradient))
    least = max(0.1 * sorted(scales.values())[len(scales) // 2], 1e-30)
    name, worst = "every parameter's gradient is the textbook's", 0.0
    for parameter in sorted(expected, key=lambda name: order.index(blocks[name]))[::-1]:
        gradient, found = expected[parameter], step.gradients[parameter]
        off = _size(gradient - found) / max(scales[blocks[parameter]], least)
        worst = max(worst, off)
        if not off <= GRADIENT_BOUND:
            length = f"one of length {float(found.norm()):.3g}, {off:.1e} off" if found.any() else "none"
            wanted = f"for {parameter} one of length {float(gradient.norm()):.3g}"
            return CheckResult("gradient", name, Verdict.WRONG, wanted, length, _file_of(parameter))
    expected_words = f"equal to float32's rounding, {GRADIENT_BOUND:.0e}"
    return CheckResult("gradient", name, Verdict.RIGHT, expected_words, f"{worst:.0e}", BLOCKS)


def _size(gradient: Tensor) -> float:
    return float(gradient.double().square().mean().sqrt())


def _file_of(parameter: str) -> str:
    """Return where a gradient that is wrong from this parameter on is made."""
    if parameter == "conv_out.bias":  # the sum of the loss's own gradient: no block is involved
        return f"{TRAINER}, {FLAT} or {UNET}"
    inside = ".resnets." in parameter or ".attentions." in parameter
    by_the_unet = "time_emb_proj" in parameter or parameter.endswith("conv1.bias")
    return BLOCKS if inside and not by_the_unet else UNET
