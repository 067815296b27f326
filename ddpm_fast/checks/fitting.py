"""Does training lower the loss, at the run's own learning rate?"""

from ddpm_fast.checks.recording import copy_of_state, put_back
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.config import with_training
from ddpm_fast.constants import TrainingTable
from ddpm_fast.diffusion.noise import NoiseAddress, random_timesteps
from ddpm_fast.engine.trainer import Trainer

STEPS, MOST = 5, 10
"""How many are taken, and how many at most: Adam's first ones are as long as later ones, before it knows the slope."""
SMALL = 0.01
"""Of the loss of predicting nothing of images from black to white. Below it a step may do harm: where all images are
grey and x0 is predicted, a new network is as good as can be."""
LOST = 1e-7
"""Rate of a step, as in a warm-up far longer than the run, that float32 rounds away: whether the loss falls is chance.
That it is the rate asked for is the optimizer's check."""
CAREFUL = 1e-3
"""Share of the rate that is tried where the rate itself fails."""


def check_fit(trainer: Trainer, number: int) -> CheckResult:
    """Take some steps on one batch, from the initial weights: its loss must fall.

    Args:
        trainer: of a small batch; its weights move.
        number: of the step that is taken again and again, past the warm-up where the run gets that far.
    """
    start, config = copy_of_state(trainer), trainer.config
    rate, examples = config.training.learning_rate, config.training.batch_size
    losses, fell = _fit(trainer, number)
    right = fell or float(trainer.figures.learning_rate) < LOST
    name = f"some steps at --learning-rate {rate:g} lower the loss of {examples} examples"
    expected, found = f"below {losses[0]:.4g}", f"{losses[-1]:.4g} after {len(losses) - 1} steps"
    file = "ddpm_fast/engine/trainer.py"
    if not right:
        put_back(trainer, start)
        trainer.numbers.bad_step.fill_(-1)
        trainer.config = with_training(config, learning_rate=CAREFUL * rate)
        if _fit(trainer, number)[1]:
            found, file = f"{found}, but at {CAREFUL * rate:g} it falls", "--learning-rate"
        trainer.config = config
    return CheckResult("fit", name, judged(right), expected, found, file)


def _fit(trainer: Trainer, number: int) -> tuple[list[float], bool]:
    """Return the loss before each step until it has fallen, and whether it has."""
    losses, most = list[float](), 0.0
    while len(losses) <= STEPS or (not losses[-1] < most and len(losses) <= MOST):
        trainer.step = number
        trainer.train_step_no_sync()
        losses.append(trainer.read_loss())
        most = max(losses[0], SMALL * _loss_of_nothing(trainer))
    return losses, losses[-1] < most


def _loss_of_nothing(trainer: Trainer) -> float:
    """Return the loss of predicting zeros for the loaded examples' timesteps, of images of black and white pixels."""
    address = NoiseAddress(trainer.key, trainer.sample_index)
    row = TrainingTable(*trainer.table[random_timesteps(address, len(trainer.table), trainer.thresholds)].unbind(1))
    return float((row.weight * (row.target_eps.square() + row.target_x_start.square())).mean())
