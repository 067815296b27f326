"""The flags of each command, as dataclasses: tyro makes the parser and its help from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from ddpm_fast.config import Config, TrainingConfig
from ddpm_fast.errors import flag, require, require_types
from ddpm_fast.options import FileOptions, LoadOptions, SampleFormat, SamplingOptions, StartOptions
from ddpm_fast.presets import PRESETS


@dataclass(frozen=True)
class TrainArguments:
    """Train a U-Net. --preset is read first and gives the defaults of all other flags.

    Ctrl-C saves and stops. `kill -USR1 PID` has the run save a checkpoint and draw a grid now, and go on as it would.
    """

    config: Config = field(default_factory=lambda: PRESETS["digits"])
    start: StartOptions = field(default_factory=StartOptions)
    file: FileOptions = field(default_factory=FileOptions)


@dataclass(frozen=True, kw_only=True)
class SampleArguments(LoadOptions, SamplingOptions):
    """Make images from a trained run, by number: image 17 of a seed is the same whatever else is asked for."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RUN_OR_CHECKPOINT]")] = ""
    """Run directory, or one of its checkpoints/step-*, wherever it was copied to; default the newest run in runs/."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = SamplingOptions.count
    """How many images; those that are there are not made again."""
    format: SampleFormat = "png"
    """png is a file for each; npz one array [N, H, W, C], "arr_0"; tar holds PNGs, as WebDataset reads them."""
    out: str = ""
    """Directory to write to; default one in RUN/samples for each sampler, seed, weights and precision."""
    animate: bool = False
    """Also write animation.gif: up to 16 images on their way from noise."""

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)  # which looks at all fields' types


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(LoadOptions, SamplingOptions):
    """Measure the quality of a trained run's samples against the images that it was trained on."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RUN_OR_CHECKPOINT]")] = ""
    """Run directory, or one of its checkpoints/step-*, wherever it was copied to; default the newest run in runs/."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1000
    """How many samples; figures of different counts are not to be compared."""
    data: str = ""
    """Where the images are that it was trained on; by default where they were then."""

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        require(self.count >= 2, f"--count is {self.count}: quality is measured over at least 2 samples")


@dataclass(frozen=True)
class ConvertArguments:
    """Turn a trained run into a folder for diffusers, an ONNX or a torch.export file; or a diffusers model into ours.

    Where DEST ends in .onnx or .pt2, the U-Net alone is written: x_t and t in, its prediction out, for any batch size.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")] = ""
    """A run, one of its checkpoints/step-*, a folder in diffusers' format, or hf:NAME of the Hugging Face hub."""
    dest: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DEST")] = ""
    """What to write: a directory or file that does not exist yet."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last trained weights."""
    images: int = 16
    """Images in the model card; 0 draws none."""

    def __post_init__(self) -> None:
        require_types(self)
        require(bool(self.source and self.dest), "convert needs SOURCE and DEST: what to convert, and where to")
        require(self.images >= 0, f"--images is {self.images}: it must not be negative")


@dataclass(frozen=True)
class CheckedTraining(TrainingConfig):
    """Training's part of a configuration that is only checked: what no check looks at is not in the help."""

    steps: tyro.conf.Suppress[int] = TrainingConfig.steps
    log_every: tyro.conf.Suppress[int] = TrainingConfig.log_every
    save_every: tyro.conf.Suppress[int] = TrainingConfig.save_every
    save_minutes: tyro.conf.Suppress[float] = TrainingConfig.save_minutes
    keep_last: tyro.conf.Suppress[int] = TrainingConfig.keep_last
    keep_every: tyro.conf.Suppress[int] = TrainingConfig.keep_every
    sample_every: tyro.conf.Suppress[int] = TrainingConfig.sample_every
    evaluate_every: tyro.conf.Suppress[int] = TrainingConfig.evaluate_every
    evaluate_count: tyro.conf.Suppress[int] = TrainingConfig.evaluate_count
    init: tyro.conf.Suppress[str] = TrainingConfig.init


@dataclass(frozen=True)
class DataArguments:
    """Look at images before anything is trained on them: what they are, how they would be trained on, and a picture."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")] = ""
    """What train's --data would name."""
    image_channels: int = 0
    """Channels of an image: 1 for grey, 3 for RGB, 4 for RGBA; 0 plans them, as the next two."""
    height: int = 0
    """Height of an image in pixels."""
    width: int = 0
    """Width of an image in pixels."""
    image_column: str = ""
    """Column of a .parquet, or ending in a .tar, that holds the images, where there are several."""
    label_column: str = ""
    """Column of a .parquet, or ending or key in a .tar, that says the class, where it is not called so."""
    float_range: Literal["none", "0..1", "-1..1"] = "none"
    """What floats in a .npy/.npz mean: the range that is mapped to black..white; uint8 needs none."""
    minutes: float = 0.0
    """Time that training may take; 0 is 60 minutes on a CPU and 240 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes an NVIDIA GPU if there is one."""
    out: str = "data.png"
    """Picture of the first images, as the network would see them; an earlier one is replaced, and no other file."""

    def __post_init__(self) -> None:
        require(bool(self.data), "PATH is missing: name a folder of images, or what else train's --data takes")
        for name in ("image_channels", "height", "width", "minutes"):
            value = getattr(self, name)
            require(value >= 0, f"{flag(name)} is {value:g}: it must not be negative")
        require(self.out.endswith(".png"), f"--out {self.out} is no picture's name: let it end in .png")


OF_A_RUN = ("--device", "--kernels", "--no-kernels", "--accept", "--strict", "--no-strict")
"""The flags that a trained run is checked with; all else is its own configuration's."""


@dataclass(frozen=True)
class CheckArguments:
    """Check the mathematics of a trained run, or of what the train flags describe."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RUN]")] = ""
    """A run directory, with --device, --kernels, --accept and --strict; left out, the flags below are checked."""
    config: Config = field(default_factory=lambda: PRESETS["digits"])
    file: FileOptions = field(default_factory=FileOptions)

    def for_help(self) -> "CheckArguments":
        """Return the same, of which tyro shows no more than is checked; all of train's flags are understood."""
        return replace(self, config=replace(self.config, training=CheckedTraining(**vars(self.config.training))))

    def require_own_flags(self, arguments: Sequence[str]) -> None:
        """Refuse a flag that a run's own configuration decides."""
        given = [argument.split("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
        for name in given if self.run else ():
            require(
                name in OF_A_RUN, f"{name} cannot change {self.run}, a run that is configured already: leave out one"
            )


@dataclass(frozen=True)
class CompareArguments:
    """Say what differs between runs, and what the difference did to the evaluation loss, address by address."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN RUN [RUN ...]")] = ()
    """Run directories, two or more: the others are compared with the first."""
    out: str = ""
    """Also write a page, one HTML file, with curves, code and the same images of each run side by side."""
    images: int = 16
    """Images of each run on the page; 0 draws none."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 1, f"compare needs two runs or more, not {len(self.runs)}: name their directories")
        require(self.images >= 0, f"--images is {self.images}: it must not be negative")


@dataclass(frozen=True)
class ListArguments:
    """List runs: step, loss, evaluation loss, size, when last written, and whether it is running or damaged."""

    runs: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DIR]")] = "runs"
    """Directory that holds runs, or a run."""
    json: bool = False
    """Print a list of objects instead of a table."""


@dataclass(frozen=True)
class SweepArguments:
    """Train all combinations of some flags' values, one after the other, each judged against one run.

    Beside the flags below takes any of train's, each with the values to try: --learning-rate 1e-3 2e-3 --flip true
    false. A list is one value: --channel-multipliers 1,2 1,2,2. What is clearly behind is stopped.
    """

    against: str = ""
    """The run to judge by, whose configuration all others share but for the flags that are tried."""
    out: str = ""
    """Directory of the runs; default runs/sweep-N with the next free N."""
    resume: bool = False
    """Continue the sweep in --out, with the flags that it was started with."""
    images: int = 16
    """Images of each run on the page; 0 draws none."""

    def __post_init__(self) -> None:
        require(bool(self.against) or self.resume, "sweep needs --against: name the run to judge by")
        require(not (self.against and self.resume), "--resume knows --against from the sweep's start: leave it out")
        require(bool(self.out) or not self.resume, "--resume needs --out: name the sweep's directory to continue")
        require(self.images >= 0, f"--images is {self.images}: it must not be negative")
