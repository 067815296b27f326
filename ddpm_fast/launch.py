"""From a configuration to a trained run: all that is asked and refused before the first step, then the training."""

import dataclasses
import time
from collections.abc import Collection
from pathlib import Path

import torch

from ddpm_fast.checks.results import report
from ddpm_fast.checks.suite import check_run
from ddpm_fast.config import Config
from ddpm_fast.data.batches import split
from ddpm_fast.data.conditions import class_labels, with_classes
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.engine.execution import set_deterministic
from ddpm_fast.errors import MathematicsError
from ddpm_fast.files import require_writable
from ddpm_fast.options import StartOptions
from ddpm_fast.planning import auto
from ddpm_fast.planning.start import resumes
from ddpm_fast.runs import checkpoint, decisions, evaluation, origin, scores
from ddpm_fast.runs.against import EITHER_WAY, Judge, reference
from ddpm_fast.runs.compare import what_will_differ
from ddpm_fast.runs.decisions import Decisions, settle
from ddpm_fast.runs.device import enough_memory, prepare_device, require_precision
from ddpm_fast.runs.directory import find_start, recorded
from ddpm_fast.runs.initial import initial_weights
from ddpm_fast.runs.lock import locked
from ddpm_fast.runs.retention import require_space
from ddpm_fast.runs.run import Run


def train_config(config: Config, start: StartOptions, progress: bool = False, stops_at: Collection[str] = ()) -> Path:
    """Train what a configuration describes; see `train`.

    Args:
        config: what to train.
        start: where to start, and what to judge the run by.
        progress: show bars.
        stops_at: verdicts that end the run, beside those of --until-decided.

    Returns:
        The run's directory.
    """
    origin.remember()
    directory = Path(start.out) if start.out else next_free(Path("runs"), config.preset)
    start = dataclasses.replace(start, resume=resumes(start), minutes=0.0)  # which its configuration holds
    if start.resume:
        recorded(directory)
    require_writable(directory)
    with locked(directory):
        return _train_in(directory, config, start, progress, stops_at)


def _train_in(directory: Path, config: Config, start: StartOptions, progress: bool, stops_at: Collection[str]) -> Path:
    """Train in a directory that no other run is in."""
    training, resume = config.training, start.resume
    decided = _decide(directory, config, start)
    dataset = open_dataset(config.data, config.unet, progress)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, revision=dataset.revision))
    config = with_classes(config, dataset)
    class_labels(config, dataset)  # what is wrong with them is said before anything is written
    if dataset.skipped:
        print(f"left out {len(dataset.skipped)} files that cannot be read (--skip-bad)")
    judge = None
    if start.against:
        ends = EITHER_WAY if start.until_decided else tuple(stops_at)
        judge = Judge(reference(start.against, config, dataset), config, ends)
        print(what_will_differ(judge.base, config), flush=True)
    found = find_start(directory, config, dataset.fingerprint, resume)
    step = found.step if found else 0
    unscored = scores.is_due(step, training, last=True) and scores.is_missing(directory, step)
    if step >= training.steps and evaluation.read(directory, step) is not None and not unscored:
        print(f"{directory} is finished: all {step} steps are done; raise --steps to go on")
        return _judged(directory, judge)
    if resume:
        print(f"{directory}: {_where_it_goes_on(directory, config, found)}")
    if warning := require_space(directory, config, step):
        print(warning)
    _check_and_train(directory, config, dataset, found, progress, judge, decided)
    return _judged(directory, judge)


def _decide(directory: Path, config: Config, start: StartOptions) -> Decisions:
    """Settle how to compute, as the run does that is continued or judged against, and say what that will take."""
    training = config.training
    device = prepare_device(training.device, training.precision)
    require_precision(training.precision, device)
    if device.type == "cuda":
        set_deterministic(training.deterministic)
    like = directory if start.resume else Path(start.against) if start.against else None
    decided, differing = settle(training, decisions.read(like) if like else None)
    for line in differing:
        print(f"{like}: {line}; roundings will differ")
    for line in auto.outlook(config, decided.device, decided.precision) if like is None else ():
        print(line, flush=True)
    return decided


def _check_and_train(
    directory: Path,
    config: Config,
    dataset: Dataset,
    found: checkpoint.Checkpoint | None,
    progress: bool,
    judge: Judge | None,
    decided: Decisions,
) -> None:
    """Train, unless the mathematics is wrong."""
    training, device = config.training, torch.device(decided.device)
    initial = initial_weights(config) if training.init and found is None else None
    with enough_memory(device, training.batch_size // training.accumulate):
        if report(check_run(config, dataset, device), strict=config.checks.strict):
            raise MathematicsError("the mathematics is wrong: nothing was trained")
        run = Run(directory, config, dataset, found, progress, judge, decided)
        if initial is not None:
            run.start_from(initial)
        if judge is not None:
            judge.recall(directory)
        trained, held_out = split(len(dataset), config.data.holdout)
        images = f"{len(trained)}" + (f" + {len(held_out)} held-out" if len(held_out) else "")
        print(f"training {directory} on {decided}: {training.steps} steps, {images} images", flush=True)
        started = time.perf_counter()
        run.train()
    done = run.trainer.step
    early = f"stopped at step {done:,} of {training.steps:,}: decided; " if done < training.steps else ""
    print(f"{early}trained in {time.perf_counter() - started:.1f} s; grids in {directory / 'samples'}")


def _where_it_goes_on(directory: Path, config: Config, found: checkpoint.Checkpoint | None) -> str:
    newest, step = checkpoint.newest(directory), found.step if found else 0
    if newest and newest.step > step and newest.config.training.steps != config.training.steps:
        why = f"before the learning rate fell towards step {newest.config.training.steps}"
        return f"continuing at step {step}, {why}"
    return f"continuing at step {step}" if found else "stopped before its first checkpoint, starting at step 0"


def _judged(directory: Path, judge: Judge | None) -> Path:
    """Say and keep what was found of a run that has come to its end."""
    if judge is not None:
        judge.recall(directory)
        judge.write(directory)
        print(judge.sentence())
    return directory


def next_free(parent: Path, name: str) -> Path:
    """Return parent/name-N with the least N that is not taken."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"
