"""Is the training table the textbook's: schedule, target and weight at every timestep?

The textbook has no table. Its loss is asked instead: of an image of one pixel per timestep, with x_start and eps as we
like, the loss's gradient by the prediction tells the target and the weight. Shapes: T timesteps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast import textbook
from ddpm_fast.checks.results import CheckResult, Stage, Verdict, judged
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, with_training
from ddpm_fast.constants import TrainingTable
from ddpm_fast.diffusion import schedule
from ddpm_fast.engine.trainer import Trainer

BOUND = 4 * torch.finfo(torch.float32).eps
"""Relative: entries are computed in float64 and rounded once."""
SCHEDULE, TRAINER = "ddpm_fast/diffusion/schedule.py", "ddpm_fast/engine/trainer.py"


class EveryTimestep:
    """Random numbers for the textbook that are none: every timestep once, eps one number."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def randint(self, high: int, shape: tuple[int]) -> Tensor:
        return torch.arange(high)

    def randn(self, shape: torch.Size) -> Tensor:
        return torch.full(shape, self.eps, dtype=torch.float64)


class Constant(nn.Module):
    """A U-Net that predicts one number, and keeps what it was asked."""

    def __init__(self, timesteps: int, value: float) -> None:
        super().__init__()
        self.prediction = torch.full((timesteps, 1, 1, 1), value, dtype=torch.float64, requires_grad=True)
        self.x_t = torch.empty(0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.x_t = x
        return self.prediction


def _loss_slope(config: Config, x_start: float, eps: float, prediction: float) -> tuple[Tensor, Tensor]:
    """Return x_t [T] and the derivative [T] of each timestep's own loss by the prediction."""
    T = config.diffusion.timesteps
    unet, images = Constant(T, prediction), torch.full((T, 1, 1, 1), (x_start + 1) * 127.5, dtype=torch.float64)
    loss = textbook.training_loss(unet, images, config, EveryTimestep(eps))
    (slope,) = torch.autograd.grad(loss, unet.prediction)
    return unet.x_t.flatten(), slope.flatten() * T


def textbook_table(config: Config) -> TrainingTable[Tensor]:
    """Return the table's columns as the textbook's training means them: [T] float64 each.

    Raises:
        KeyError: the textbook does not know the schedule or the prediction.
    """
    config = with_training(replace(config, data=DataConfig()), timestep_density="uniform")
    (signal, of_image), (noise, of_eps) = _loss_slope(config, 1, 0, 0), _loss_slope(config, 0, 1, 0)
    weight = (_loss_slope(config, 1, 0, 1)[1] - of_image) / 2  # the slope is 2 * weight * (prediction - target)
    return TrainingTable(signal, noise, -of_eps / (2 * weight), -of_image / (2 * weight), weight)


@contextmanager
def _textbook_with(betas: Callable[[DiffusionConfig], Any]) -> Iterator[None]:
    """Let the textbook take its betas from elsewhere for a while."""
    own = textbook.make_betas
    textbook.make_betas = betas
    try:
        yield
    finally:
        textbook.make_betas = own


def check_table(trainer: Trainer) -> Iterator[CheckResult]:
    """Compare the columns of the table that training reads with the textbook's, at every timestep."""
    config, betas = trainer.config, textbook.make_betas
    try:
        betas(config.diffusion)
    except KeyError:
        betas, name = schedule.betas, "the textbook knows the schedule"
        found, known = config.diffusion.schedule, "linear, cosine or sigmoid"
        yield CheckResult("schedule", name, Verdict.CHANGED, known, found, SCHEDULE)
    with _textbook_with(betas):
        yield from _compare_columns(trainer, config)


def _compare_columns(trainer: Trainer, config: Config) -> Iterator[CheckResult]:
    prediction, stages = config.diffusion.prediction, 3
    try:
        expected = textbook_table(config)
    except KeyError:
        known = replace(config, diffusion=replace(config.diffusion, prediction="eps"))
        expected, stages = textbook_table(known), 1
    fresh = schedule.training_table(config.diffusion, config.training.min_snr_gamma).to(trainer.device)
    file = SCHEDULE if torch.equal(fresh, trainer.table) else TRAINER
    columns = TrainingTable(*trainer.table.double().cpu().unbind(1))
    compared: list[tuple[Stage, str, tuple[str, ...]]] = [
        ("schedule", f"signal and noise of the {config.diffusion.schedule} schedule", ("signal", "noise")),
        ("target", f"the target is {prediction}, at every t", ("target_eps", "target_x_start")),
        ("loss", "the loss weighs every t", ("weight",)),
    ]
    for stage, name, fields in compared[:stages]:
        worst = max(_first_off(field, getattr(columns, field), getattr(expected, field)) for field in fields)
        wanted, found = worst[1:] if worst[0] else ("the textbook's", "the same")
        yield CheckResult(stage, name, judged(not worst[0]), wanted, found, file)
    if stages == 1:
        name, known = "the textbook knows what is predicted", "eps, x0 or v"
        yield CheckResult("target", name, Verdict.CHANGED, known, prediction, SCHEDULE)


def _first_off(field: str, found: Tensor, expected: Tensor) -> tuple[bool, str, str]:
    """Return whether a column is off, and what was expected and found where it is so first."""
    if found.shape != expected.shape:
        return True, f"{len(expected)} timesteps", f"{len(found)}"
    off = ~((found - expected).abs() <= BOUND * expected.abs() + 1e-37)
    if not off.any():
        return False, "", ""
    t = int(off.nonzero()[0])
    return True, f"{field} {float(expected[t]):.6g} at t = {t}", f"{float(found[t]):.6g}"
