"""What differs between two runs, and what the difference did: paired, address by address.

Two runs of one seed see the same images, timesteps, noise and dropout, and every run is evaluated at the same addresses
(see `evaluation`). So the difference at each address is the change's alone, and its mean stands out from its standard
error long before two curves part. A run against itself differs by exactly nothing.
"""

import difflib
import json
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.config import Config
from ddpm_fast.errors import InputError, flag
from ddpm_fast.flags import changed_flags
from ddpm_fast.runs import evaluation, origin
from ddpm_fast.runs.directory import read_config, read_metrics

SAME_LOG_SNR = 0.25
"""Two schedules are compared where their nearest timesteps to an address differ by no more than this."""
ROUNDING = 1e-5
"""The share of the loss that another number of threads, accumulation or hardware changes by rounding alone."""
FILES_NAMED = 3
"""Changed source files that one line names, those that decide images first; of more it says how many."""
LOSS_IS_NOT_QUALITY = "Loss is not sample quality: look at the pictures, too"


@dataclass(frozen=True)
class RecordedRun:
    """What a run left on the disk."""

    path: Path
    config: Config
    fingerprint: str
    """Of its data set."""

    @cached_property
    def origin(self) -> origin.Origin | None:
        return origin.read(self.path)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    @property
    def evaluated_steps(self) -> list[int]:
        """The steps evaluated up to now: the run may be going on."""
        return evaluation.evaluated_steps(self.path)

    def evaluated(self, step: int) -> evaluation.Evaluation | None:
        """Return what was evaluated after a step, see `evaluation.read`."""
        return evaluation.read(self.path, step)

    @property
    def images_per_s(self) -> float | None:
        """Training's rate: the median over the logging intervals but the first, which starts things up."""
        rates = [line["wall"]["images_per_s"] for line in self.metrics if "images_per_s" in (line.get("wall") or {})]
        return statistics.median(rates[1:] or rates) if rates else None


def open_run(path: Path) -> RecordedRun:
    """Read what a run is.

    Raises:
        InputError: there is no run, or its config.json cannot be read.
    """
    found = read_config(path)
    if found is None:
        reason = "its config.json is missing or torn" if path.is_dir() else "it does not exist"
        raise InputError(f"{path} is no run ({reason}): name the directory of one, runs/digits-1 say")
    return RecordedRun(path, *found)


@dataclass(frozen=True)
class Difference:
    """Another run's evaluation less the base's, at one step."""

    step: int
    base: float
    other: float
    standard_error: float
    """Of the mean difference over the images of the addresses."""
    addresses: int
    """How many were compared: those at which both schedules have the same noise level."""
    bands: list[float]
    """The mean difference in each band of noise levels, from almost pure noise to almost none."""
    base_bands: list[float]
    """The base's mean in each band."""

    @property
    def relative_bands(self) -> list[float]:
        """Return each band's difference as a share of the base's loss there."""
        return [apart / base if base else math.nan for apart, base in zip(self.bands, self.base_bands, strict=True)]

    @property
    def is_rounding(self) -> bool:
        """Is the difference so small that rounding may be all of it."""
        return abs(self.mean) <= ROUNDING * self.base

    @property
    def mean(self) -> float:
        return self.other - self.base

    @property
    def sigmas(self) -> float:
        """How many standard errors the mean difference is from nothing; negative is lower, which is better."""
        return self.mean / self.standard_error if self.standard_error else 0.0

    def __str__(self) -> str:
        """Say it in words."""
        if self.mean == 0 and self.standard_error == 0:
            return "evaluation loss exactly equal"
        if self.is_rounding:
            return f"evaluation loss equal but for rounding ({self.mean / self.base:+.0e} of it)"
        lower = "lower" if self.mean < 0 else "higher"
        digits = f"{abs(self.mean):.2g} +- {self.standard_error:.1g}"
        return f"evaluation loss {digits} {lower} ({self.mean / self.base:+.1%}, {abs(self.sigmas):.0f} sigma)"


def difference(
    step: int, base: evaluation.Evaluation, other: evaluation.Evaluation, weights: str = "ema"
) -> Difference | None:
    """Compare two runs at the addresses that both were asked about; None where there are none.

    An image that comes at several addresses counts as one observation of their sum: its errors are not independent.
    """
    count = min(len(base.image), len(other.image))
    same = base.image[:count] == other.image[:count]
    same &= (base.log_snr[:count] - other.log_snr[:count]).abs() <= SAME_LOG_SNR
    n = int(same.sum())
    if not n:
        return None
    a, b = base.errors[weights][:count].double(), other.errors[weights][:count].double()
    apart = b - a
    _, image = base.image[:count][same].unique(return_inverse=True)
    images = int(image.max()) + 1
    excess = torch.zeros(images, dtype=torch.float64).index_add_(0, image, apart[same] - apart[same].mean())
    variance = float(excess.square().sum()) / n**2 * images / (images - 1) if images > 1 else 0.0
    in_bands = evaluation.by_band(apart, same), evaluation.by_band(a, same)
    return Difference(step, float(a[same].mean()), float(b[same].mean()), variance**0.5, n, *in_bands)


def differences(base: RecordedRun, other: RecordedRun, weights: str = "ema") -> list[Difference]:
    """Compare two runs at each step that both were evaluated at, by their "ema" or "raw" weights."""
    found = []
    for step in sorted(set(base.evaluated_steps) & set(other.evaluated_steps)):
        a, b = base.evaluated(step), other.evaluated(step)
        one = difference(step, a, b, weights) if a is not None and b is not None else None
        found += [] if one is None else [one]
    return found


def not_paired(base: RecordedRun, other: RecordedRun) -> str:
    """Say why two runs were not asked about the same images, or "" where they were."""
    if base.fingerprint != other.fingerprint:
        return "they are of other images"
    if base.config.data.holdout != other.config.data.holdout:
        return "they hold out other images"
    return ""


@dataclass(frozen=True)
class ChangedFile:
    """A source file that differs between two runs."""

    path: str
    lines: list[str]
    """A unified diff."""

    def __str__(self) -> str:
        """Say it in words."""
        added, removed = (sum(line[:1] == sign and line[:3] != 3 * sign for line in self.lines) for sign in "+-")
        return f"ddpm_fast/{self.path} (+{added} -{removed} lines)"


def changed_code(base: RecordedRun, other: RecordedRun) -> list[ChangedFile]:
    """Return the source files that differ; none where either run's code is not on record."""
    if base.origin is None or other.origin is None:
        return []
    return _changed_files(base.origin.sources, other.origin.sources)


def _changed_files(before: origin.Sources, now: origin.Sources) -> list[ChangedFile]:
    return [
        ChangedFile(path, _diff(path, before.get(path, ""), now.get(path, "")))
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]


def _diff(path: str, before: str, now: str) -> list[str]:
    return list(difflib.unified_diff(before.splitlines(), now.splitlines(), path, path, lineterm=""))


def changed_surroundings(base: RecordedRun, other: RecordedRun) -> dict[str, tuple[Any, Any]]:
    """Return what else differs: versions, device, driver, threads, git's commit."""
    if base.origin is None or other.origin is None:
        return {}
    before, now = base.origin.facts, other.origin.facts
    names = [name for name in before | now if name not in ("command", "files", "versions")]
    found = {name: (before.get(name), now.get(name)) for name in names}
    old, new = before.get("versions", {}), now.get("versions", {})
    found |= {name: (old.get(name), new.get(name)) for name in old | new}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def what_differs(base: RecordedRun, other: RecordedRun) -> list[str]:
    """Return one line for each thing that differs between two runs, or one that says that nothing does."""
    lines = _flags_that_differ(base.config, other.config)
    lines += [f"code: {file}" for file in changed_code(base, other)]
    lines += [f"{name}: {_plain(a)} -> {_plain(b)}" for name, (a, b) in changed_surroundings(base, other).items()]
    for run in (base, other):
        if run.origin is None:
            lines.append(f"code: not on record of {run.path}")
    if base.fingerprint != other.fingerprint:
        lines.append(f"data: other images ({base.fingerprint[:12]} -> {other.fingerprint[:12]})")
    return lines or ["nothing: one configuration, one code, one machine"]


def what_will_differ(base: RecordedRun, config: Config) -> str:
    """Say in one line in which flags and code a run that is about to train differs from a base."""
    found = _flags_that_differ(base.config, config)
    if base.origin is not None:
        files = _changed_files(base.origin.sources, origin.read_sources())
        files.sort(key=lambda file: not file.path.startswith(origin.DECIDES_IMAGES))
        found += [str(file) for file in files[:FILES_NAMED]]
        found += [f"{len(files) - FILES_NAMED} more source files"] if len(files) > FILES_NAMED else []
    unknown = f" (the code of {base.path} is not on record)" if base.origin is None else ""
    if found:
        return f"differs from {base.path} in {'; '.join(found)}{unknown}"
    return f"nothing differs from {base.path}: same flags" + (unknown or ", same code")


def _flags_that_differ(base: Config, other: Config) -> list[str]:
    return [f"{flag(name)}: {_plain(a)} -> {_plain(b)}" for name, (a, b) in changed_flags(base, other).items()]


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else str(value)


def table(base: RecordedRun, other: RecordedRun) -> list[str]:
    """Return the paired differences at each common step as lines of a table, or why there are none."""
    reason = not_paired(base, other)
    found = [] if reason else differences(base, other)
    if not found:
        return [f"no paired difference: {reason or 'no step was evaluated in both'}"]
    lines = [
        "    step      base     other  difference  sigma   in five noise levels, from almost pure noise to almost none"
    ]
    for one in found:
        in_bands = "".join(f"{value:+9.1%}" for value in one.relative_bands)
        lines.append(
            f"{one.step:8d}{one.base:10.5f}{one.other:10.5f}{one.mean / one.base:+12.2%}{one.sigmas:+7.1f}{in_bands}"
        )
    if found[-1].addresses < evaluation.examples_at(found[-1].step):
        lines.append(f"    at the {found[-1].addresses} addresses where both schedules have the same noise level")
    return lines
