"""Is the loss the textbook's: right target, right weight, averaged right, and is its gradient its derivative?

Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.checks.recording import Call, TrainingStep, distance
from ddpm_fast.checks.results import CheckResult, Verdict, judged
from ddpm_fast.constants import TrainingTable
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.ops import Ops

TRAINER = "ddpm_fast/engine/trainer.py"
BOUND = 256 * torch.finfo(torch.float32).eps
"""Relative: a mean of some thousand squares is 1e-6 off."""
NEAR = 0.05
"""How far beside the target, relative to the prediction's distance from it, a loss is looked at."""


class Example(NamedTuple):
    """What a call of noise_mse compared, in float64: each [N, C, H, W], the weight [N]."""

    prediction: Tensor
    target: Tensor
    weight: Tensor

    def loss(self) -> Tensor:
        """Compute Equation 14, weighted: [N]."""
        return self.weight * (self.prediction - self.target).square().mean((1, 2, 3))

    def gradient(self) -> Tensor:
        """Return the derivative of each image's loss by its prediction: [N, C, H, W]."""
        off = self.prediction - self.target
        return self.weight.view(-1, 1, 1, 1) * 2 * off / off[0].numel()


def example_of(call: Call, x_start: Tensor, eps: Tensor) -> Example:
    """Return what a call should have compared, by the table that it was given."""
    row = TrainingTable(*call.given["table"].double()[call.given["t"]].unbind(1))
    of_eps, of_x_start = (column.view(-1, 1, 1, 1) for column in (row.target_eps, row.target_x_start))
    return Example(call.given["prediction"].double(), of_eps * eps + of_x_start * x_start, row.weight)


def check_loss(trainer: Trainer, steps: list[TrainingStep], made: list[tuple[Tensor, Tensor]]) -> Iterator[CheckResult]:
    """Check each image's loss, its minimum and gradient, and what a step makes of all images' losses.

    Args:
        trainer: whose steps were recorded.
        steps: recorded.
        made: x_start and eps of each step's whole batch.
    """
    ops = trainer.unet.ops
    yield from _check_each_image(ops, steps, made)
    name, expected = "a step's gradient is that of the mean of its images' losses", "the mean's"
    off, ratio = max(_gradient_off(ops, step) for step in steps)
    found = f"{ratio:.4g} times that, {off:.1e} off"
    yield CheckResult("loss", name, judged(off <= BOUND), expected, found, TRAINER)
    told = [(step.loss, float(step.returned("noise_mse").double().mean())) for step in steps]
    loss, mean = max(told, key=lambda told: -1.0 if abs(told[0] / told[1] - 1) <= BOUND else abs(told[0] - told[1]))
    name, right = "a step's loss is the mean of its images' losses", abs(loss / mean - 1) <= BOUND
    yield CheckResult("loss", name, judged(right), f"{mean:.6g}", f"{loss:.6g}", f"{TRAINER} or {_update_file(ops)}")


def _update_file(ops: Ops) -> str:
    return "kernels/adam_ema.py" if ops.fused else "ddpm_fast/ops/reference.py"


def _check_each_image(ops: Ops, steps: list[TrainingStep], made: list[tuple[Tensor, Tensor]]) -> Iterator[CheckResult]:
    file = "kernels/noise_mse.py" if ops.fused else "ddpm_fast/ops/reference.py"
    name, expected = "an image's loss is its weighted squared error", "weight * mean((target - prediction)**2)"
    result = partial(CheckResult, "loss", name, expected=expected, file=file)
    for step, (x_start, eps) in zip(steps, made, strict=True):
        first = 0
        for call in step.ops["noise_mse"]:
            part = slice(first, first + len(call.returned))
            first = part.stop
            example = example_of(call, x_start[part], eps[part])
            if example.target.shape != example.prediction.shape:
                yield result(Verdict.WRONG, found=f"a prediction of {tuple(example.prediction.shape)}")
                return
            if distance(call.returned, example.loss()) > BOUND:
                yield from _describe(ops, call, example, file)
                return
            gradient = _gradient_of(ops, call)
            if distance(gradient, example.gradient()) > BOUND:
                off = distance(gradient, example.gradient())
                name, words = "the loss's gradient is its derivative", "2 * weight * (prediction - target) / pixels"
                yield CheckResult("gradient", name, Verdict.WRONG, words, f"{off:.1e} off", file)
                return
    yield result(Verdict.RIGHT, found="so")


def _describe(ops: Ops, call: Call, example: Example, file: str) -> Iterator[CheckResult]:
    """Say in what way a loss differs: where its minimum lies, how it weighs, or another form."""
    off = example.prediction - example.target

    def at(distance: float) -> Tensor:
        prediction = (example.target + distance * off).to(call.given["prediction"].dtype)
        return _losses(ops, call, prediction.contiguous(memory_format=torch.channels_last)).double()

    lowest, full, half = at(0.0), at(1.0), at(0.5)
    beside = torch.minimum(at(NEAR), at(-NEAR))
    if bool(((lowest > 1e-6 * full.abs()) & (beside < lowest)).any()):
        name = "the loss is lowest at its target"
        words = f"{float(lowest.max()):.2g} where the prediction is the target, less beside it"
        yield CheckResult("target", name, Verdict.WRONG, "its minimum there", words, file)
        return
    name, expected = "an image's loss is its weighted squared error", "weight * mean((target - prediction)**2)"
    ratio = full / example.loss()
    if bool(((full / half - 4).abs() < 0.01).all()):
        words = f"{float(ratio.min()):.4g} to {float(ratio.max()):.4g} times that"
        yield CheckResult("loss", name, Verdict.WRONG, expected, words, file)
        return
    words = f"another function of the error: {float(ratio.min()):.4g} to {float(ratio.max()):.4g} times that"
    yield CheckResult("loss", name, Verdict.CHANGED, expected, words, file)
    along = (_gradient_of(ops, call).double() * off).sum()
    step = 1e-2
    slope = (at(1 + step) - at(1 - step)).sum() / (2 * step)
    right = abs(float(along - slope)) <= 0.02 * abs(float(slope))
    found = f"{float(along):.3g} where differences say {float(slope):.3g}"
    yield CheckResult("gradient", "the loss's gradient is its derivative", judged(right), "so", found, file)


def _losses(ops: Ops, call: Call, prediction: Tensor) -> Tensor:
    return ops.noise_mse(**(call.given | {"prediction": prediction}))


def _gradient_of(ops: Ops, call: Call) -> Tensor:
    """Return the derivative of each image's loss by its prediction, as the op has it."""
    prediction = call.given["prediction"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_losses(ops, call, prediction).sum(), prediction)
    return gradient


def _gradient_off(ops: Ops, step: TrainingStep) -> tuple[float, float]:
    """Return how far the gradient that a step went on with is from the mean's, and how many times that it is."""
    images = step.config.training.batch_size
    gradient = torch.cat([_gradient_of(ops, call) for call in step.ops["noise_mse"]]) / images
    taken = torch.cat(step.prediction_gradients)
    ratio = float((taken * gradient).sum() / gradient.square().sum()) if taken.shape == gradient.shape else 0.0
    return distance(taken, gradient), ratio
