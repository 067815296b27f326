"""A run judged while it trains, against one that was trained before: lower, higher, or too early to say.

The judge looks at the paired differences of `compare` as they come. A difference counts from the end of both runs'
warm-up on, and decides when it is DECIDED standard errors from nothing in two evaluations one after the other: the
errors at the addresses say how certain a difference is of these weights, and the second evaluation that it is not the
last few batches' doing. What other seeds would have given is not known: runs of one seed share all chance that a change
leaves them, and runs of two get no verdict.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_fast.config import Config
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files import replace_file
from ddpm_fast.flags import changed_flags
from ddpm_fast.runs import evaluation
from ddpm_fast.runs.compare import (
    LOSS_IS_NOT_QUALITY,
    Difference,
    RecordedRun,
    difference,
    differences,
    open_run,
)

DECIDED = 5.0
"""Standard errors from nothing at which a difference is believed."""
FIRST_STEP = 100
"""Before it no verdict is given: fewer addresses are evaluated, and little is trained."""
LEAST_SHARE = 0.5
"""Of the addresses, that two schedules must have in common for a verdict."""
HORIZONS = 5
"""Times 1 / (1 - decay) steps, after which an average has forgotten what came before."""
IN_A_ROW = 2
"""Evaluations, one after the other, that must agree."""
LOST = ("higher",)
EITHER_WAY = ("lower", "higher")
"""Verdicts after which more steps change little: one of them, and both."""

WORDS = {"lower": "better: ", "higher": "worse: ", "equal": ""}
"""What is said before a difference, which says itself whether it is lower, higher or none; other verdicts by name."""


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


def acts_late(base: Config, other: Config) -> tuple[int, str]:
    """Return the step up to which flags that act late keep a verdict from being given, and why; 0 where none does."""
    changed, late = changed_flags(base, other), [(0, "")]
    if "ema_decay" in changed:
        lower, upper = sorted(changed["ema_decay"])
        split = max(0, round((10 * lower - 1) / (1 - lower)))
        end = split + round(HORIZONS / (1 - upper))
        why = f"--ema-decay acts late: both averages are alike to step {split:,}, and forget that by step {end:,}"
        late.append((end, why))
    one, two = base.training, other.training
    if "cooldown" in changed or ("steps" in changed and one.cooldown):
        split, end = min(one.cooldown_start, two.cooldown_start), max(one.steps, two.steps)
        late.append((end, f"a cooldown acts late: from step {split:,} on one rate falls, and it is for step {end:,}"))
    elif set(changed) == {"steps"}:
        late.append((max(changed["steps"]), "--steps changes nothing while both runs go on"))
    return max(late)


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

    def look(self, step: int, evaluated: evaluation.Evaluation) -> Difference | None:
        """Compare an evaluation with the other run's at the same step; None where there is none."""
        theirs = self.base.evaluated(step)
        found = difference(step, theirs, evaluated) if theirs is not None else None
        self.found += [] if found is None else [found]
        return found

    @property
    def too_early(self) -> str:
        """Why the last difference does not count yet, or ""."""
        step, warm_up = self.found[-1].step, self._warm_up
        end, reason = acts_late(self.base.config, self.config)
        if step < end:
            return reason
        if step < max(warm_up, FIRST_STEP):
            return (
                f"the warm-up ends at step {warm_up:,}" if step < warm_up else f"step {step:,} of at least {FIRST_STEP}"
            )
        return ""

    @property
    def _warm_up(self) -> int:
        return max(config.training.warmup_steps for config in (self.base.config, self.config))

    @property
    def chance(self) -> str:
        """Why no verdict can be given at all, or ""."""
        if self.base.config.training.seed != self.config.training.seed:
            return "they are of other seeds, and chance may be all of the difference"
        last = self.found[-1]
        if last.addresses < LEAST_SHARE * evaluation.examples_at(last.step):
            return f"their schedules have the same noise level at {last.addresses} addresses only"
        return ""

    @property
    def decided(self) -> bool:
        """Is the sign of the difference certain."""
        last = self.found[-IN_A_ROW:]
        first = max(self._warm_up, FIRST_STEP)
        if len(last) < IN_A_ROW or any(one.step < first or one.is_rounding for one in last):
            return False
        return all(one.sigmas <= -DECIDED for one in last) or all(one.sigmas >= DECIDED for one in last)

    @property
    def verdict(self) -> str:
        """One of lower, higher, equal, undecided, too early, none."""
        if not self.found or self.chance:
            return "none"
        if self.too_early:
            return "too early"
        last = self.found[-1]
        if last.is_rounding:
            return "equal"
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
        last = self.found[-1]
        if self.chance:
            said = f"none: {self.chance}; at the end {last}"
        elif self.too_early:
            said = f"too early to say: {self.too_early}; so far {last}"
        else:
            said = f"{WORDS.get(self.verdict, f'{self.verdict}: ')}{last}"
        asked = "" if self.config.data.holdout else ", on images that are trained on"
        return f"verdict {against} at step {last.step:,}{asked}: {said}. {LOSS_IS_NOT_QUALITY}"

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
