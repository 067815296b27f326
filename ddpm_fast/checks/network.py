"""Is the engine's U-Net the textbook's, block by block, and is its gradient right?

A U-Net that is another one is a change; a gradient that is not its loss's derivative is a fault.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_fast import textbook
from ddpm_fast.checks.derivatives import find_wrong_gradient
from ddpm_fast.checks.followed import BLOCK_BOUND, ENDS, FLOAT32, ROUNDINGS, Difference, FollowedUNet
from ddpm_fast.checks.recording import TrainingStep, distance
from ddpm_fast.checks.results import CheckResult, Verdict, judged
from ddpm_fast.config import UNetConfig
from ddpm_fast.engine.trainer import Trainer

UNET, BLOCKS = "ddpm_fast/model/unet.py", "ddpm_fast/model/blocks.py"
TRAINER, FLAT = "ddpm_fast/engine/trainer.py", "ddpm_fast/engine/flat_weights.py"
GRADIENT_BOUND = 4096 * FLOAT32
"""Relative to the block's largest: gradients, through all blocks behind, were 3e-6 off."""


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
    exact = followed.gradients()
    differing = followed.differing()
    if differing:
        yield _describe(name, followed, differing[0], trainer)
        yield find_wrong_gradient(trainer, step)
        return
    worst = max((d.distance for d in followed.differences if d.block != "time_embedding"), default=0.0)
    expected = f"equal to float32's rounding, {BLOCK_BOUND:.0e}"
    yield CheckResult("network", name, Verdict.RIGHT, expected, f"{worst:.0e}", UNET)
    yield _compare_gradients(followed, exact)


def _check_arguments(step: TrainingStep) -> CheckResult:
    """Check that nothing lies between q_sample, the network and the loss."""
    x_t, prediction = step.returned("q_sample"), step.joined("noise_mse", "prediction")
    differing = [
        words
        for words, same in (
            ("another x_t than q_sample made", distance(step.told(0, "x"), x_t) <= FLOAT32),
            ("another t", torch.equal(step.told(1, "t"), step.joined("q_sample", "t"))),
            (
                "a loss of another prediction",
                distance(prediction, torch.cat([call.returned for call in step.modules[""]])) <= FLOAT32,
            ),
        )
        if not same
    ]
    name, found = "the network is given x_t and t, and the loss what it returns", ", ".join(differing) or "so"
    return CheckResult("network", name, judged(not differing), "as they are", found, TRAINER)


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
    where = f"block {blocks.index(first.block) + 1} of {len(blocks)}, {first.block or 'all of it'}"
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


def _compare_gradients(followed: FollowedUNet, exact: dict[str, Tensor]) -> CheckResult:
    """Compare each parameter's gradient, and name the first one that differs, from the end of the network on."""
    found, order = followed.step.gradients, list(dict.fromkeys(block for block, *_ in followed.differences))
    blocks = {name: next((block for block in order if name.startswith(f"{block}.")), order[0]) for name in exact}
    scales = dict.fromkeys(blocks.values(), 0.0)
    for name, gradient in exact.items():  # a bias before a softmax, or a group of one channel, has a gradient of 0
        scales[blocks[name]] = max(scales[blocks[name]], _size(gradient))
    least = max(0.1 * sorted(scales.values())[len(scales) // 2], 1e-30)
    scale = {name: max(scales[blocks[name]], least) for name in exact}
    off = {name: _size(gradient - found[name]) / scale[name] for name, gradient in exact.items()}
    wrong = [name for name in exact if not off[name] <= GRADIENT_BOUND]
    if wrong:  # where rounding grows, what the textbook does in float32 is the measure
        rounded = FollowedUNet(followed.step, torch.float32).gradients()
        allowed = {
            name: GRADIENT_BOUND + ROUNDINGS * _size(rounded[name] - exact[name]) / scale[name] for name in wrong
        }
        wrong = [name for name in wrong if not off[name] <= allowed[name]]
    name = "every parameter's gradient is the textbook's"
    if not wrong:
        expected = f"equal to float32's rounding, {GRADIENT_BOUND:.0e}"
        return CheckResult("gradient", name, Verdict.RIGHT, expected, f"{max(off.values()):.0e}", BLOCKS)
    last = max(wrong, key=lambda name: order.index(blocks[name]))
    last = [name for name in wrong if blocks[name] == blocks[last]][-1]
    words = f"one of length {float(found[last].norm()):.3g}, {off[last]:.1e} off" if found[last].any() else "none"
    wanted = f"for {last} one of length {float(exact[last].norm()):.3g}"
    return CheckResult("gradient", name, Verdict.WRONG, wanted, words, _file_of(last))


def _size(gradient: Tensor) -> float:
    return float(gradient.double().square().mean().sqrt())


def _file_of(parameter: str) -> str:
    """Return where a gradient that is wrong from this parameter on is made."""
    if parameter == "conv_out.bias":  # the sum of the loss's own gradient: no block is involved
        return f"{TRAINER}, {FLAT} or {UNET}"
    inside = ".resnets." in parameter or ".attentions." in parameter
    by_the_unet = "time_emb_proj" in parameter or parameter.endswith("conv1.bias")
    return BLOCKS if inside and not by_the_unet else UNET
