"""Does a step that is compiled and captured, as the run takes it, do what the same step does eagerly?

The rule is that of the kernels: twice as far from an eager step as that, in the run's own precision, is from one in
float32. So a bfloat16 run is held to bfloat16, and a float32 run to float32's rounding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_fast.checks.recording import State, copy_of_state, put_back
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.checks.stand_in import perturb
from ddpm_fast.config import with_training
from ddpm_fast.engine.trainer import WARM_UP_STEPS, Trainer

SLACK = 1e-3
"""Relative: where both are float32, compiled sums come in another order, and Adam's first steps are nearly signs."""


def _take(trainer: Trainer, start: State, late: int) -> dict[str, Tensor]:
    """Take a run's first steps from a state, and a late one from there as well.

    Returns:
        The losses, and how far weights and averages went, side by side.
    """
    found: dict[str, list[Tensor]] = {"loss": [], "model": [], "ema": []}
    for numbers in (range(WARM_UP_STEPS + 2), [late]):
        put_back(trainer, start)
        for number in numbers:
            trainer.step = number
            trainer.train_step_no_sync()
            found["loss"].append(torch.tensor([trainer.read_loss()]))
        end = copy_of_state(trainer)
        for part in ("model", "ema"):
            found[part] += [(end[part][name] - weight).flatten() for name, weight in start[part].items()]
    return {part: torch.cat(values).double() for part, values in found.items()}


def _eager(trainer: Trainer, precision: str) -> Trainer:
    return Trainer(with_training(trainer.config, precision=precision), trainer.batch, trainer.device)


def check_as_run(trainer: Trainer, late: int) -> Iterator[CheckResult]:
    """Take the first steps of a run as it takes them, captured ones among them, and eagerly; put the trainer back.

    Args:
        trainer: the run's own, at step 0, compiled or captured; of its own batch size, so that what is compiled here is
            what will run.
        late: number of a step past the warm-up: a captured step must read its number from the device.
    """
    initial = copy_of_state(trainer)
    perturb(trainer.unet)
    start = copy_of_state(trainer)
    found = _take(trainer, start, late)
    put_back(trainer, initial)
    precisions = (trainer.config.training.precision, "fp32")
    eager, exact = (_take(_eager(trainer, precision), start, late) for precision in precisions)
    words = {"loss": "loss", "model": "way of the weights", "ema": "way of the averages"}
    for part, word in words.items():
        size = float(exact[part].norm())
        off, usual = (float((one[part] - other[part]).norm()) / size for one, other in ((found, eager), (eager, exact)))
        name = f"the {word} in a {trainer.execution} step is that of an eager one"
        bound, file = 2 * usual + SLACK, "ddpm_fast/engine/trainer.py or ddpm_fast/engine/cuda_graphs.py"
        yield CheckResult("kernels", name, judged(off <= bound), f"within {bound:.1e}", f"{off:.1e} off", file)
