"""Does training lower the loss, at the run's own learning rate?"""

from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.engine.trainer import Trainer

STEPS = 5


def check_fit(trainer: Trainer, number: int) -> CheckResult:
    """Take some steps on one batch, from the initial weights: its loss must fall.

    Args:
        trainer: of a small batch; its weights move.
        number: of the step that is taken again and again, past the warm-up.
    """
    losses = []
    for _ in range(STEPS + 1):
        trainer.step = number
        trainer.train_step_no_sync()
        losses.append(trainer.read_loss())
    first, last, training = losses[0], losses[-1], trainer.config.training
    rate, examples = training.learning_rate, training.batch_size
    name = f"{STEPS} steps at a learning rate of {rate:g} lower the loss of {examples} examples"
    return CheckResult(
        "fit", name, judged(last < first), f"below {first:.4g}", f"{last:.4g}", "ddpm_fast/engine/trainer.py"
    )
