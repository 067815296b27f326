"""The quality of a run's samples: by which images they are judged, when a run judges its own, and two runs' scores.

runs/NAME/
  metrics.jsonl   "quality" in the lines of the steps that --evaluate-every names, and of the last
  quality/        what `ddpm-fast evaluate` found
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddpm_fast.config import Config, TrainingConfig
from ddpm_fast.data.batches import split
from ddpm_fast.data.conditions import class_labels
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import key_from_seed, permutation
from ddpm_fast.quality.evaluator import MEASURES, Evaluator
from ddpm_fast.runs.compare import RecordedRun
from ddpm_fast.runs.directory import read_metrics
from ddpm_fast.runs.grids import to_uint8

SEED = 0x6C61626C
"""Of the order of labels that samples are made for."""


def evaluator_of(config: Config, dataset: Dataset, progress: bool | None = None) -> Evaluator:
    """Return what judges samples by a data set's images, of which --holdout's were not trained on.

    Raises:
        InputError: there are too few images.
    """
    labels = dataset.labels
    trained, held_out = (rows.numpy() for rows in split(len(dataset), config.data.holdout))
    if not len(held_out):
        return Evaluator(dataset.images, labels, None, dataset.fingerprint, progress)
    labels = labels[trained] if labels is not None else None
    return Evaluator(dataset.images[trained], labels, dataset.images[held_out], dataset.fingerprint, progress)


def labels_to_ask(config: Config, dataset: Dataset) -> tuple[int, ...]:
    """Return which labels a conditional run's samples are made for: those of the images that it trains on, shuffled."""
    labels, trained = class_labels(config, dataset), split(len(dataset), config.data.holdout)[0]
    if labels is None:
        return ()
    return tuple(labels[trained[permutation(key_from_seed(SEED), 0, len(trained))].numpy()].tolist())


def asked_of(labels: tuple[int, ...], numbers: range) -> NDArray[np.int64] | None:
    """Return the labels of samples by their numbers, [N], given those of samples 0, 1, ..., over and over."""
    return np.array([labels[number % len(labels)] for number in numbers]) if labels else None


def is_due(step: int, training: TrainingConfig, last: bool) -> bool:
    """Return whether --evaluate-every asks for scores after a step, the run's last or another."""
    return step > 0 and training.evaluate_every > 0 and (last or step % training.evaluate_every == 0)


def is_missing(run: Path, step: int) -> bool:
    """Return whether a run's last line of metrics, which is that step's, has no scores yet."""
    lines = read_metrics(run)
    return bool(lines) and lines[-1]["step"] == step and "quality" not in lines[-1]


class Scores:
    """Judges a run's samples while it trains; what it needs of the real images it finds out the first time."""

    def __init__(self, config: Config, dataset: Dataset, bar: bool) -> None:
        """Take a run's configuration, its data set, and whether to show bars."""
        self._config, self._dataset, self._bar = config, dataset, bar

    @cached_property
    def _evaluator(self) -> Evaluator:
        return evaluator_of(self._config, self._dataset, self._bar)

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """Of samples 0, 1, ..., over and over, for a conditional run."""
        return labels_to_ask(self._config, self._dataset)

    def of(self, samples: Tensor) -> dict[str, float]:
        """Return the scores of samples [N, C, H, W] of these labels; see `Evaluator.score`."""
        return self._evaluator.score(to_uint8(samples), asked_of(self.labels, range(len(samples))))


def in_words(scores: Mapping[str, float], count: int) -> str:
    """Return the scores of so many samples as the progress line shows them, without the real images'."""
    own = [f"{measure}_{count}" for measure in MEASURES if f"{measure}_{count}" in scores]
    return ", ".join(f"{name} {scores[name]:.3g}" for name in own)


def side_by_side(base: RecordedRun, other: RecordedRun) -> list[str]:
    """Return the scores of two runs' samples at the last step at which both have some, as lines; none without."""
    of_steps = [{line["step"]: line["quality"] for line in run.metrics if line.get("quality")} for run in (base, other)]
    common = sorted(of_steps[0].keys() & of_steps[1].keys())
    if not common:
        return []
    before, now = (scores[common[-1]] for scores in of_steps)
    names = [name for name in before if name in now]
    lines = [f"sample quality at step {common[-1]:,}{'base':>19}{'other':>11}"]
    return lines + [f"  {name:<34}{before[name]:11.4f}{now[name]:11.4f}" for name in names]
