"""A run judged while it trains, against one that was trained before: lower, higher, or too early to say.

The judge looks at the paired differences of `compare` as they come. A difference counts from the end of both runs'
warm-up on, and decides when it is DECIDED standard errors from nothing in two evaluations one after the other: the
errors at the addresses say how certain a difference is of these weights, and the second evaluation that it is not the
last few batches' doing.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_fast.config import Config
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.errors import InputError, flag
from ddpm_fast.files import replace_file
from ddpm_fast.runs import evaluation
from ddpm_fast.runs.compare import (
    LOSS_IS_NOT_QUALITY,
    Difference,
    RecordedRun,
    changed_flags,
    difference,
    differences,
    open_run,
)

DECIDED = 5.0
"""Standard errors from nothing at which a difference is believed."""
IN_A_ROW = 2
"""Evaluations, one after the other, that must agree."""
LOST = ("higher",)
EITHER_WAY = ("lower", "higher")
"""Verdicts after which more steps change little: one of them, and both."""
LATE_FLAGS = ("ema_decay", "steps")
"""What changes nothing for long: no verdict on them is due while nothing differs."""


def reference(path: str, config: Config, dataset: Dataset) -> RecordedRun:
    """Open the run to judge against.

    Raises:
        InputError: it is no run, was never evaluated, or was asked about other images.
    """
    run = open_run(Path(path))
    if run.fingerprint != dataset.fingerprint:
        raise InputError(
            f"--against {path} was trained on other images than {config.data.data}: a difference could be theirs; "
            "leave --data and the image size as they were"
        )
    if run.config.data.holdout != config.data.holdout:
        raise InputError(f"--against {path} has --holdout {run.config.data.holdout}: leave the flag out")
    if not run.evaluated_steps:
        raise InputError(f"--against {path} was never evaluated: train it again with this version, then against it")
    return run


def acts_late(base: Config, other: Config) -> str:
    """Say why two configurations that differ in late flags alone cannot differ yet, or "" where they may."""
    changed = changed_flags(base, other)
    if not changed or not set(changed) <= set(LATE_FLAGS):
        return ""
    if "ema_decay" not in changed:
        return "--steps changes nothing while both runs go on"
    lower = min(changed["ema_decay"])
    start = max(0, round((10 * lower - 1) / (1 - lower)))
    return f"{flag('ema_decay')} acts late: both averages warm up alike to step {start:,}"


@dataclass
class Judge:
    """What is known so far of a run against another."""

    base: RecordedRun
    config: Config
    stops_at: Collection[str] = ()
    """Verdicts at which the run shall stop."""
    found: list[Difference] = field(default_factory=list)

    def recall(self, run: Path) -> None:
        """Begin with what a run that is continued was found to be so far."""
        self.found = differences(self.base, open_run(run))

    def look(self, step: int, errors: evaluation.Errors) -> Difference | None:
        """Compare an evaluation with the other run's at the same step; None where there is none."""
        theirs = self.base.errors(step)
        if theirs is None:
            return None
        self.found.append(difference(step, theirs["ema"], errors["ema"]))
        return self.found[-1]

    @property
    def warm_up(self) -> int:
        """The step from which on a difference counts."""
        return max(config.training.warmup_steps for config in (self.base.config, self.config))

    @property
    def decided(self) -> bool:
        """Is the sign of the difference certain."""
        last = self.found[-IN_A_ROW:]
        counts = len(last) == IN_A_ROW and all(one.step >= self.warm_up for one in last)
        return counts and (all(one.sigmas <= -DECIDED for one in last) or all(one.sigmas >= DECIDED for one in last))

    @property
    def verdict(self) -> str:
        """One of lower, higher, equal, undecided, too early, none."""
        if not self.found:
            return "none"
        last = self.found[-1]
        if last.mean == 0 and last.standard_error == 0:
            return "too early" if acts_late(self.base.config, self.config) else "equal"
        if last.step < self.warm_up:
            return "too early"
        if not self.decided:
            return "undecided"
        return "lower" if last.mean < 0 else "higher"

    @property
    def stops(self) -> bool:
        """Has the run's end come, whatever steps are left."""
        return self.verdict in self.stops_at

    def sentence(self) -> str:
        """Return the verdict in words, with the figures that it rests on."""
        against = f"against {self.base.path}"
        if not self.found:
            return f"no verdict {against}: no step was evaluated in both"
        last, verdict = self.found[-1], self.verdict
        if verdict == "too early":
            reason = acts_late(self.base.config, self.config) or f"the warm-up ends at step {self.warm_up:,}"
            said = f"too early to say: {reason}; so far {last}"
        else:
            said = f"{verdict}: {last}"
        return f"verdict {against} at step {last.step:,}: {said}. {LOSS_IS_NOT_QUALITY}"

    def write(self, run: Path) -> None:
        """Keep the verdict in the run's directory.

        Raises:
            InputError: it cannot be written.
        """
        values: dict[str, object] = {"against": str(self.base.path), "verdict": self.verdict}
        if self.found:
            last = self.found[-1]
            values |= {"step": last.step, "base": last.base, "other": last.other}
            values |= {"standard_error": last.standard_error, "sigmas": last.sigmas}
        replace_file(run / "verdict.json", (json.dumps(values, indent=2) + "\n").encode())
