"""Numerical guards: what stops a run that is lost, and says once what looks wrong.

A run is lost with the first loss or gradient that is not finite, and when its evaluation loss rose RISES times running,
each time by more than chance, to LOST times its best. What is looked at was computed for the log or an evaluation
anyway, but for one pass of LOOKED_AT images through the network beside each evaluation.
Shapes: N addresses of an evaluation, see `evaluation`.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.config import Config
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.errors import MathematicsError
from ddpm_fast.progress import say
from ddpm_fast.runs import checkpoint, evaluation
from ddpm_fast.runs.directory import read_metrics
from ddpm_fast.runs.evaluation import EARLY_STEPS, Evaluation

SLOW_START_STEPS = 500
"""By this step, and after the warm-up, the loss must have fallen below that of predicting nothing."""
RISES = 3
"""So often running an evaluation loss must have risen, or a logged value been too high, before that means anything."""
SURE = 2.0
"""Standard errors of a difference at the same addresses that are no chance."""
SUSPICIOUS, LOST = 1.25, 2.0
"""Times the best evaluation loss."""
STEEP, STEEP_HISTORY = 1000.0, 10
"""Times the median of earlier gradients' norms, of which so many must be known."""
RECENT = 1000
"""Logged gradients' norms that the median is taken of."""
LARGEST_HALF = 65504.0
"""The largest number of float16. Layers of healthy networks return far less; bfloat16 keeps 3 digits of what is more,
and its square, which a GroupNorm sums up, has 10 digits before the point."""
LOOKED_AT = 8


def rises(evaluations: Sequence[Tensor]) -> bool:
    """Return whether each evaluation [N] is higher than the one before, at the addresses of both, and not by chance."""
    for before, after in pairwise(evaluations):
        n = min(len(before), len(after))
        higher = (after[:n] - before[:n]).double()
        if not higher.mean() > SURE * higher.std() / math.sqrt(n):
            return False
    return True


def times_the_best(evaluations: Sequence[Tensor]) -> float:
    """Return the last evaluation [N] as a multiple of the least one, at the addresses that all have."""
    n = min(map(len, evaluations))
    means = [float(one[:n].double().mean()) for one in evaluations]
    return means[-1] / min(means) if min(means) > 0 else 1.0


class Guards:
    """Watches one run."""

    def __init__(
        self, config: Config, directory: Path, trainer: Trainer, saved: Callable[[], object] = lambda: None
    ) -> None:
        """Take up what the run has logged and evaluated before.

        Args:
            config: the run's.
            directory: of the run.
            trainer: of the run.
            saved: waits for a checkpoint that is being written.
        """
        self.config, self.directory, self.trainer, self._wait_until_saved = config, directory, trainer, saved
        self._said = set[str]()
        self._evaluations = dict[int, Tensor]()
        for step in evaluation.evaluated_steps(directory):
            found = evaluation.read(directory, step)
            if found is not None:
                self._evaluations[step] = _of_what_is_trained_on(found)
        self._losses, self._norms = list[float](), list[float]()
        for line in read_metrics(directory):
            self._remember(line)

    def _remember(self, metrics: Mapping[str, Any]) -> None:
        for name, values in (("loss", self._losses), ("gradient_norm", self._norms)):
            if isinstance(metrics.get(name), float):
                values.append(metrics[name])

    def _warn(self, what: str, text: str) -> None:
        """Say once that something looks wrong."""
        if what not in self._said:
            self._said.add(what)
            say(f"warning: step {self.trainer.step:,}: {text}")

    @property
    def _remedies(self) -> str:
        lower = "" if self.trainer.dtype == torch.float32 else ", or --precision fp32"
        return f"a lower --learning-rate{',' if lower else ' or'} a longer --warmup-steps{lower}"

    def stop_if_not_finite(self) -> None:
        """Stop the run at the first step whose loss or gradient was not finite, and name the layer.

        Raises:
            MathematicsError: there was such a step.
        """
        bad_step = int(self.trainer.numbers.bad_step)
        if bad_step < 0:
            return
        self._wait_until_saved()
        where, good = self.trainer.locate_nonfinite(), checkpoint.newest(self.directory)
        kept = f"the last good checkpoint is {good.path}" if good else "there was no checkpoint yet"
        if where:
            raise MathematicsError(f"step {bad_step}: {where} is not finite; {kept}. Try {self._remedies}")
        raise MathematicsError(
            f"step {bad_step}: a loss or gradient was not finite, but all of it is when the step is taken again layer "
            f"by layer; {kept}. Compiled or captured code, or the hardware, is at fault: try --no-compile, --no-capture"
        )

    def look_at_log(self, metrics: Mapping[str, Any]) -> None:
        """Warn of a loss that does not fall or is lost again, and of gradients that explode."""
        self._remember(metrics)
        self._warn_if_not_learning()
        earlier, last = self._norms[-RECENT - RISES : -RISES], self._norms[-RISES:]
        usual = statistics.median(earlier) if len(earlier) >= STEEP_HISTORY else 0.0
        if usual > 0 and min(last) > STEEP * usual:
            self._warn(
                "gradients",
                f"the gradient's norm is {last[-1]:.2g}, and was {usual:.2g} before: gradients explode; try "
                f"{self._remedies}",
            )

    def _warn_if_not_learning(self) -> None:
        training, step = self.config.training, self.trainer.step
        due = max(SLOW_START_STEPS, training.warmup_steps)
        starts, last = 0 <= step - due < training.log_every, self._losses[-RISES:]
        if not starts and min(last) < 2 * min(self._losses):
            return
        nothing = self.trainer.zero_prediction_loss()
        if starts and last[-1] > 0.9 * nothing:
            self._warn(
                "learning",
                f"the loss {last[-1]:.3f} is still that of predicting nothing ({nothing:.3f}): the learning rate may "
                "be far too low or too high, or the data may be constant; run ddpm-fast check "
                f"{self.directory}",
            )
        elif min(last) > nothing > 2 * min(self._losses):
            self._warn(
                "forgetting",
                f"the loss was {min(self._losses):.3f}, and is again above that of predicting nothing ({nothing:.3f}): "
                f"training may have diverged; try {self._remedies}",
            )

    def look_at_evaluation(self, evaluated: Evaluation) -> None:
        """Stop a run that diverges, warn of one that may, and of layers whose outputs explode.

        Raises:
            MathematicsError: the evaluation loss is not finite, or keeps rising and is far above its best.
        """
        step, values = self.trainer.step, _of_what_is_trained_on(evaluated)
        self._evaluations[step] = values
        if not torch.isfinite(values).all():
            raise MathematicsError(f"step {step}: the evaluation loss is not finite; {self._newest_until(step)}")
        steps = sorted(one for one in self._evaluations if EARLY_STEPS <= one <= step)
        known = [self._evaluations[one] for one in steps]
        if len(known) > RISES and rises(known[-RISES - 1 :]) and times_the_best(known) > SUSPICIOUS:
            best = min(steps, key=lambda one: float(self._evaluations[one].double().mean()))
            fact = (
                f"the evaluation loss rose {RISES} times running, to {times_the_best(known):.2g} times its best, "
                f"{float(self._evaluations[best].double().mean()):.4f} of step {best:,}"
            )
            if times_the_best(known) > LOST:
                kept = self._newest_until(steps[-RISES - 1])
                raise MathematicsError(f"step {step}: the run diverges: {fact}; {kept}. Try {self._remedies}")
            self._warn("rising", f"{fact}: the run may diverge; if it goes on, try {self._remedies}")
        self._warn_if_outputs_explode()

    def _newest_until(self, step: int) -> str:
        self._wait_until_saved()
        good = next((one for one in checkpoint.newest_first(self.directory) if one.step <= step), None)
        return f"the last checkpoint before it is {good.path}" if good else "there is no checkpoint from before it"

    def _warn_if_outputs_explode(self) -> None:
        layer, magnitude = self.trainer.largest_output(LOOKED_AT)
        if magnitude > LARGEST_HALF:
            self._warn(
                "outputs",
                f"the output of {layer} reaches {magnitude:.2g}: its outputs explode, and half precision would "
                f"overflow; try {self._remedies}",
            )


def _of_what_is_trained_on(evaluated: Evaluation) -> Tensor:
    """Return the errors [N] that only divergence raises: of images held out, overfitting does so, too."""
    return evaluated.errors.get("training_ema", evaluated.errors["ema"])
