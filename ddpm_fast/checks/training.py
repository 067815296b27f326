"""Is training the textbook's? Each stage is recomputed from what the engine was recorded doing before it.

So the first fault is named, and is not carried on.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_fast.checks.batch import check_batch, check_x_t, what_q_sample_makes
from ddpm_fast.checks.dropout import check_dropout
from ddpm_fast.checks.fitting import check_fit
from ddpm_fast.checks.followed import watched_modules
from ddpm_fast.checks.labels import check_told
from ddpm_fast.checks.layers import check_group_norm, check_time_shifts, check_upsampling
from ddpm_fast.checks.loss import check_loss
from ddpm_fast.checks.network import check_network
from ddpm_fast.checks.recording import State, TrainingStep, copy_of_state, put_back, record_step
from ddpm_fast.checks.results import CheckResult, Stage, Verdict, judged
from ddpm_fast.checks.stand_in import exact_float32, perturb, steps_to_check
from ddpm_fast.checks.training_table import check_table
from ddpm_fast.checks.updates import ENGINE, check_updates
from ddpm_fast.config import Config
from ddpm_fast.constants import TRAINING_COLUMN
from ddpm_fast.engine.trainer import Trainer


def check_training(trainer: Trainer, run: Config) -> Iterator[CheckResult]:
    """Check the whole of training, in the order in which a step goes through it.

    Args:
        trainer: of `stand_in.small_trainer`, at its start; its weights move and are put back.
        run: the configuration of the run that it stands for.
    """
    start = copy_of_state(trainer)
    try:
        with exact_float32():
            perturb(trainer.unet)
            yield from _check_every_stage(trainer, run)
            yield check_first_average(start)
            put_back(trainer, start)
            yield check_fit(trainer, steps_to_check(run.training)[-1])
    finally:
        put_back(trainer, start)


def _check_every_stage(trainer: Trainer, run: Config) -> Iterator[CheckResult]:
    steps = record_steps(trainer, run)
    yield (finite := check_finite(steps))
    if not finite.passed:
        return
    made = [what_q_sample_makes(trainer, step) for step in steps]
    yield from check_batch(trainer, steps, made)
    yield from check_told(trainer, steps)
    yield from check_table(trainer)
    yield check_x_t(trainer, steps, made)
    yield from check_group_norm(trainer)
    yield check_upsampling(trainer)
    yield from check_dropout(steps, trainer.unet.ops.fused)
    yield from check_time_shifts(trainer)
    yield from check_network(trainer, steps[1], run.unet)
    yield from check_loss(trainer, steps, made)
    yield from check_updates(steps, trainer.unet.ops.fused)


def check_finite(steps: list[TrainingStep]) -> CheckResult:
    """Find the first stage of a step whose values are not finite: what follows would be nothing else."""
    name, finite = "every value of a training step is finite", "finite"
    for step in steps:
        prediction = step.output("")
        stages: list[tuple[Stage, str, list[Tensor]]] = [
            ("q_sample", "ddpm_fast/ops/reference.py", [step.returned("q_sample")]),
            ("network", "ddpm_fast/model/unet.py", [] if prediction is None else [prediction]),
            ("loss", "ddpm_fast/ops/reference.py", [step.returned("noise_mse")]),
            ("gradient", "ddpm_fast/model/blocks.py", list(step.gradients.values())),
            ("optimizer", "ddpm_fast/ops/reference.py", list(step.after["model"].values())),
            ("ema", "ddpm_fast/ops/reference.py", list(step.after["ema"].values())),
        ]
        for stage, file, values in stages:
            if not all(bool(torch.isfinite(value).all()) for value in values):
                found = f"not so in stage {stage} of step {step.number}"
                return CheckResult(stage, name, Verdict.WRONG, finite, found, file)
    return CheckResult("optimizer", name, Verdict.RIGHT, finite, finite, "ddpm_fast/engine/trainer.py")


def check_first_average(start: State) -> CheckResult:
    """Check that the average of a trainer that has taken no step is its weights."""
    unlike = [name for name, weight in start["model"].items() if not torch.equal(start["ema"][name], weight)]
    name, expected = "the average begins as the weights", "the initial weights"
    found = f"another {unlike[0]}" if unlike else expected
    return CheckResult("ema", name, judged(not unlike), expected, found, ENGINE)


def record_steps(trainer: Trainer, run: Config) -> list[TrainingStep]:
    """Record a step at a run's start, in its warm-up and late, with gradients too short and too long to clip."""
    modules, steps, table, limit = watched_modules(trainer.config.unet), [], trainer.table, run.training.clip_norm
    for updates, number in enumerate(steps_to_check(run.training)):
        if updates and limit:  # the loss's weight lengthens the gradient
            lengths = [float(g.norm()) for g in steps[0].gradients.values()]
            norm = torch.tensor(lengths).norm().clamp(min=1e-12)
            trainer.table = table.clone()
            trainer.table[:, TRAINING_COLUMN.weight] *= limit / norm * (4 if updates == 1 else 1 / 4)
        steps.append(record_step(trainer, number, updates, modules))
    trainer.table = table
    return steps
