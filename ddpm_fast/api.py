"""The Python interface: train a run, load a model, make images. The command line calls the same functions.

Errors are the command line's sentences, which name its flags: --batch-size is the keyword batch_size, and --no-kernels
is kernels=False.
Shapes: N images, C channels, H x W pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ddpm_fast.config import DataConfig
from ddpm_fast.flags import field_names, plain, with_flags
from ddpm_fast.launch import train_config
from ddpm_fast.options import LoadOptions, StartOptions, Wanted
from ddpm_fast.planning.start import starting_config, with_auto_batch
from ddpm_fast.presets import AUTO
from ddpm_fast.runs.accelerated import AcceleratedPipeline
from ddpm_fast.runs.directory import read_metrics
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
        InputError: a field of either configuration cannot be honoured; it is named. So is num_class_embeds, for
            pipelines pass no labels.
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
        known = with_flags(AUTO, {name: value for name, value in flags.items() if name in field_names(DataConfig)})
        fits = flags.get("batch_size") == "auto"
        flags = {name: value for name, value in flags.items() if not (fits and name == "batch_size")}
        wanted = Wanted(**{name: plain(value) for name, value in flags.items() if name in field_names(Wanted)})
        config = with_flags(starting_config(preset, start, known.data, wanted, str(flags.get("init", ""))), flags)
        config = with_auto_batch(config, start) if fits else config
        return TrainedRun(train_config(config, start, progress))
