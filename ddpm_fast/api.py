"""The Python interface: train a run, load a model, make images. The command line calls the same functions.

Errors are the command line's sentences, which name its flags: --batch-size is the keyword batch_size, and --no-kernels
is kernels=False.
Shapes: N images, C channels, H x W pixels.
"""

import dataclasses
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ddpm_fast.checks.results import report
from ddpm_fast.checks.suite import check_run
from ddpm_fast.config import Config, DataConfig
from ddpm_fast.data.batches import split
from ddpm_fast.data.conditions import class_labels, with_classes
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.engine.execution import set_deterministic
from ddpm_fast.errors import MathematicsError, require
from ddpm_fast.files import require_writable
from ddpm_fast.flags import plain, with_flags
from ddpm_fast.options import LoadOptions, StartOptions, Wanted
from ddpm_fast.presets import AUTO, plans
from ddpm_fast.presets import preset as find_preset
from ddpm_fast.runs import auto, checkpoint, decisions, evaluation, fitting, origin, scores
from ddpm_fast.runs.accelerated import AcceleratedPipeline
from ddpm_fast.runs.against import EITHER_WAY, Judge, reference
from ddpm_fast.runs.compare import open_run, what_will_differ
from ddpm_fast.runs.decisions import settle
from ddpm_fast.runs.device import enough_memory, prepare_device, require_precision
from ddpm_fast.runs.directory import find_start, holds_run, read_config, read_metrics, recorded, where_data_is
from ddpm_fast.runs.initial import initial_weights, with_network_of
from ddpm_fast.runs.lock import locked
from ddpm_fast.runs.retention import require_space
from ddpm_fast.runs.run import Run
from ddpm_fast.runs.signals import Signals
from ddpm_fast.runs.trained_model import LoadKeywords, Model, options_from


@dataclass(frozen=True)
class TrainedRun:
    """A run in its directory."""

    directory: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl: "step", "loss", "gradient_norm", "learning_rate" and "wall" of each logging interval."""
        return read_metrics(self.directory)

    def load(self, **keywords: Unpack[LoadKeywords]) -> Model:
        """Load the newest checkpoint; see `load`."""
        return load(self.directory, **keywords)


def load(run: str | Path, **keywords: Unpack[LoadKeywords]) -> Model:
    """Load a trained model.

    Sets PyTorch's switches for TF32, which belong to the process, as the precision asks.

    Args:
        run: a run's directory, for its newest checkpoint, or one of its checkpoints/step-*, wherever it was copied to;
            or a folder in diffusers' format, or the name of such a model on the Hugging Face hub, as hf:NAME.
        keywords:
            weights: "ema", averaged, the default; or "raw", the last trained.
            device: "auto" (the default) takes an NVIDIA GPU if there is one; or "cpu", "cuda".
            precision: "auto" (the default) is bf16 on GPUs good at it, else fp32; or "fp32", "tf32", "bf16".
            kernels: run the Triton kernels on an NVIDIA GPU, default True.
            compile: compile the U-Net on a GPU, and on a CPU for long sampling, default True.
            capture: capture each step on a GPU as a CUDA graph, default True.

    Raises:
        InputError: there is no checkpoint, it is damaged, or a keyword or value is refused, also a diffusers model's.
    """
    return Model(Path(run), options_from(LoadOptions, keywords))


def accelerate(pipeline: Any) -> AcceleratedPipeline:
    """Return what makes a diffusers pipeline's images on our loop, called as the pipeline is.

    It holds a copy of the weights of now. Noise is addressed: a generator's seed decides on the images, but they are
    others than the pipeline's own of that seed.

    Args:
        pipeline: a DDPMPipeline, DDIMPipeline or alike, on its device: a UNet2DModel in `unet`, and a DDPMScheduler,
            DDIMScheduler or DPMSolverMultistepScheduler in `scheduler`.

    Raises:
        InputError: a field of either configuration cannot be honoured; it is named.
    """
    return AcceleratedPipeline(pipeline)


def train(
    preset: str | None = None,
    *,
    out: str | Path = "",
    resume: bool = False,
    resume_or_start: bool = False,
    against: str | Path = "",
    until_decided: bool = False,
    minutes: float = 0,
    progress: bool = True,
    **flags: Any,
) -> TrainedRun:
    """Check the mathematics, then train, saying what is done on the way.

    Args:
        preset: what gives the defaults of all flags: a name of `PRESETS`, or "auto", which plans them by the images.
            Left out, it is "auto" where `data` is given, else "digits".
        out: the run's directory, which must not exist or be empty; by default runs/PRESET-N with the next free N.
        resume: continue from the newest whole checkpoint of `out`, which must hold a run, with more steps from before
            its cooldown; flags left out are those of the run.
        resume_or_start: the same if `out` holds a run, else start one there.
        against: a run to judge this one by: flags left out come from its config.json.
        until_decided: stop once the evaluation loss is certain to be lower or higher than that run's.
        minutes: that a planned run may take; 0 is an hour on a CPU, and four on a GPU.
        progress: show bars.
        flags: any other flag of `ddpm-fast train`, by its Python name, as kernels=False or batch_size=64, or "auto".

    Raises:
        InputError: a flag or value is refused, the data cannot be used, or the disk not be written.
        MathematicsError: a check failed, nothing was trained; or a value was not finite, the last good checkpoint is
            kept.
        InterruptedRunError: SIGINT or SIGTERM arrived, in the main thread; the finished steps are saved.
    """
    start = StartOptions(str(out or ""), resume, resume_or_start, str(against or ""), until_decided, minutes)
    with Signals():
        known = with_flags(AUTO, {name: value for name, value in flags.items() if name in _names(DataConfig)})
        fits = flags.get("batch_size") == "auto"
        flags = {name: value for name, value in flags.items() if not (fits and name == "batch_size")}
        wanted = Wanted(**{name: plain(value) for name, value in flags.items() if name in _names(Wanted)})
        config = with_flags(starting_config(preset, start, known.data, wanted, str(flags.get("init", ""))), flags)
        return train_config(with_auto_batch(config, start) if fits else config, start, progress)


def with_auto_batch(config: Config, start: StartOptions) -> Config:
    """Settle --batch-size auto: a plan has a number, as has a run that is continued or judged against."""
    known = "the run" if _resumes(start) or start.against else "the plan" if config.preset == AUTO.preset else ""
    if known:
        print(f"--batch-size auto: {config.training.batch_size}, as {known} has it", flush=True)
    return config if known else fitting.with_fitting_batch(config)


def _names(part: type) -> list[str]:
    return [f.name for f in dataclasses.fields(part)]


def starting_config(
    preset: str | None,
    start: StartOptions,
    data: DataConfig | None = None,
    wanted: Wanted | None = None,
    init: str = "",
) -> Config:
    """Return what flags change: a preset, a plan, or the run's own that is continued or judged against.

    Args:
        preset: the name that was given, if any.
        start: where to start.
        data: that is given.
        wanted: what of a plan is fixed.
        init: the model, if any, whose U-Net and process are taken.

    Raises:
        InputError: there is no such preset or run, nothing to resume was named, or nothing can be planned.
    """
    require(not (start.against and preset), f"--preset {preset} and --against {start.against}: leave one of them out")
    if _resumes(start):
        run = Path(start.out)
        config, _ = recorded(run)
        if read_config(run) is None:
            print(f"{run / 'config.json'} is missing or torn: it is written anew, as the newest checkpoint has it")
        return dataclasses.replace(where_data_is(run, config), preset=preset or config.preset)
    data, wanted = data or DataConfig(), wanted or Wanted()
    if start.against:
        config = open_run(Path(start.against)).config
    elif plans(preset, data.data, start.minutes):
        config = auto.planned(data, _for_network(init, wanted) if init else wanted, start.minutes)
    else:
        config = find_preset(preset or "digits")
    return with_network_of(init, config) if init else config


def _for_network(init: str, wanted: Wanted) -> Wanted:
    """Return what a plan must keep to where the U-Net is another model's."""
    unet = vars(with_network_of(init, AUTO).unet)
    return dataclasses.replace(wanted, **{name: unet[name] for name in _names(Wanted) if name in unet})


def _resumes(start: StartOptions) -> bool:
    """Return whether a run is to be continued."""
    if start.resume or start.resume_or_start:
        name = "--resume" if start.resume else "--resume-or-start"
        require(start.out != "", f"{name} needs --out: name the run directory to continue")
    return start.resume or (start.resume_or_start and holds_run(Path(start.out)))


def train_config(
    config: Config, start: StartOptions, progress: bool = False, stops_at: Collection[str] = ()
) -> TrainedRun:
    """Train what a configuration describes; see `train`.

    Args:
        config: what to train.
        start: where to start, and what to judge the run by.
        progress: show bars.
        stops_at: verdicts that end the run, beside those of --until-decided.
    """
    origin.remember()
    directory = Path(start.out) if start.out else next_free(Path("runs"), config.preset)
    start = dataclasses.replace(start, resume=_resumes(start), minutes=0.0)  # which its configuration holds
    if start.resume:
        recorded(directory)
    require_writable(directory)
    with locked(directory):
        return _train_in(directory, config, start, progress, stops_at)


def _train_in(
    directory: Path, config: Config, start: StartOptions, progress: bool, stops_at: Collection[str]
) -> TrainedRun:
    """Train in a directory that no other run is in."""
    training, resume = config.training, start.resume
    device = prepare_device(training.device, training.precision)
    require_precision(training.precision, device)
    if device.type == "cuda":
        set_deterministic(training.deterministic)
    like = directory if resume else Path(start.against) if start.against else None
    decided, differing = settle(training, decisions.read(like) if like else None)
    for line in differing:
        print(f"{like}: {line}; roundings will differ")
    for line in auto.outlook(config, decided.device, decided.precision) if like is None else ():
        print(line, flush=True)
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
    initial = initial_weights(config) if training.init and found is None else None
    if warning := require_space(directory, config, step):
        print(warning)
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
    return _judged(directory, judge)


def _where_it_goes_on(directory: Path, config: Config, found: checkpoint.Checkpoint | None) -> str:
    newest, step = checkpoint.newest(directory), found.step if found else 0
    if newest and newest.step > step and newest.config.training.steps != config.training.steps:
        why = f"before the learning rate fell towards step {newest.config.training.steps}"
        return f"continuing at step {step}, {why}"
    return f"continuing at step {step}" if found else "stopped before its first checkpoint, starting at step 0"


def _judged(directory: Path, judge: Judge | None) -> TrainedRun:
    """Say and keep what was found of a run that has come to its end."""
    if judge is not None:
        judge.recall(directory)
        judge.write(directory)
        print(judge.sentence())
    return TrainedRun(directory)


def next_free(parent: Path, name: str) -> Path:
    """Return parent/name-N with the least N that is not taken."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"
