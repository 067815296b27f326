"""Is a gradient the derivative of the engine's own loss? By finite differences, in float64.

For a U-Net that is not the textbook's on purpose: how it computes is its owner's choice, its gradient is not.
A direction moves each parameter in proportion to its own size, so that all matter alike.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.checks.recording import TrainingStep
from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.ops import REFERENCE

STEP = 1e-5
"""Of a parameter's own size, to either side: float64 leaves a derivative nine digits."""
BOUND = 1e-3
"""Of what a direction's parameters contribute, taken as independent; float32's gradient is 1e-5 off."""
NAME = "the gradient is the derivative of this U-Net's own loss"
FILES = "ddpm_fast/model/blocks.py or ddpm_fast/model/unet.py"


class Slope:
    """The loss's derivative along directions, by differences and by the recorded gradient."""

    def __init__(self, trainer: Trainer, step: TrainingStep) -> None:
        self.loss, self.weights = _loss_in_float64(trainer, step)
        generator = torch.Generator().manual_seed(1)
        self.directions: dict[str, Tensor] = {}
        self.expected: dict[str, float] = {}
        for name, gradient in step.gradients.items():
            weight = self.weights[name]
            spread = weight.square().mean().sqrt().clamp(min=1e-3)
            direction = spread * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
            self.directions[name] = direction
            self.expected[name] = float((gradient.double() * direction).sum())
        self.all = sum(value**2 for value in self.expected.values()) ** 0.5

    def along(self, names: list[str]) -> float:
        """Return the derivative along the directions of these parameters at once, by differences."""
        losses = []
        for sign in (1, -1):
            for name in names:
                self.weights[name].add_(self.directions[name], alpha=sign * STEP)
            losses.append(self.loss())
            for name in names:
                self.weights[name].sub_(self.directions[name], alpha=sign * STEP)
        return (losses[0] - losses[1]) / (2 * STEP)

    def is_wrong(self, names: list[str]) -> bool:
        """Return whether the recorded gradient says otherwise."""
        expected = sum(self.expected[name] for name in names)
        share = sum(self.expected[name] ** 2 for name in names) ** 0.5
        return not abs(self.along(names) - expected) <= BOUND * share + 1e-6 * self.all

    def first_wrong(self, names: list[str]) -> str:
        """Return one wrong parameter of several that are wrong together, from the end of the network on."""
        while len(names) > 1:
            early, late = names[: len(names) // 2], names[len(names) // 2 :]
            names = late if self.is_wrong(late) else early
        return names[0]


@torch.no_grad()
def find_wrong_gradient(trainer: Trainer, step: TrainingStep) -> CheckResult:
    """Compare the recorded gradient with differences of the loss, and name a parameter for which they differ."""
    expected = f"within {BOUND:.0e} of finite differences"
    try:
        slope = Slope(trainer, step)
        silent = [name for name, gradient in step.gradients.items() if not gradient.any()]
        others = [name for name in step.gradients if name not in silent]
        wrong = next((names for names in (silent, others) if names and slope.is_wrong(names)), None)
    except (RuntimeError, TypeError) as error:
        found = f"it does not run in float64, so this was not checked: {str(error).splitlines()[0]}"
        return CheckResult("gradient", NAME, Verdict.CHANGED, expected, found, FILES)
    if wrong is None:
        return CheckResult("gradient", NAME, Verdict.RIGHT, expected, "so", FILES)
    name = slope.first_wrong(wrong)
    found = f"along {name} the loss changes by {slope.along([name]):.3g}, not by {slope.expected[name]:.3g}"
    return CheckResult("gradient", NAME, Verdict.WRONG, expected, found, FILES)


def _loss_in_float64(trainer: Trainer, step: TrainingStep) -> tuple[Callable[[], float], dict[str, Tensor]]:
    """Return the loss of the recorded batch as a function of weights, which start where the step did."""
    unet = copy.deepcopy(trainer.unet).double()
    ops = REFERENCE if trainer.unet.ops.fused else trainer.unet.ops
    embedding = ops.timestep_embedding
    unet.use(replace(ops, timestep_embedding=lambda *given, **named: embedding(*given, **named).double()))
    weights = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    for name, weight in weights.items():
        weight.copy_(step.before["model"][name])

    def loss() -> float:
        total = torch.zeros((), dtype=torch.float64)
        for call, compared in zip(step.modules[""], step.ops["noise_mse"], strict=True):
            given = {name: _wide(value) for name, value in call.given.items()}
            positional = [given.pop(name) for name in list(given) if name.isdigit()]
            prediction = unet(*positional, **given)
            losses = ops.noise_mse(
                **(compared.given | {"prediction": prediction, "table": _wide(compared.given["table"])})
            )
            total += losses.sum().cpu()
        return float(total) / step.config.training.batch_size

    return loss, weights


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
