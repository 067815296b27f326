"""What is asked of a run beside what it computes: where it starts, which images to make of it, and how.

Imports nothing heavy, so that `ddpm-fast --help` answers at once.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

from ddpm_fast.config import Config, Precision, SamplerConfig, SamplerName, Spacing
from ddpm_fast.errors import flag, require, require_seed, require_types

SampleFormat = Literal["png", "npz", "tar"]


@dataclass(frozen=True)
class FileOptions:
    """Where more flags are written down."""

    config: str = ""
    """TOML file of flags by their Python names, flat or in [unet], [training] ...; flags that are given win over it."""

    def __post_init__(self) -> None:
        require_types(self)


@dataclass(frozen=True)
class StartOptions:
    """Where a run starts, and when it stops."""

    out: str = ""
    """Run directory, which must not exist or be empty; default runs/PRESET-N with the next free N."""
    resume: bool = False
    """Continue --out, which must hold a run, from its newest whole checkpoint; flags left out are those of the run."""
    resume_or_start: bool = False
    """For job scripts: continue --out if it holds a run, else start one there."""
    against: str = ""
    """A run to judge this one by, evaluation by evaluation; flags left out come from its config.json."""
    until_decided: bool = False
    """Stop once the evaluation loss is certain to be lower or higher than that of --against."""
    minutes: float = 0.0
    """Time that a run planned by its images (--preset auto) may take; 0 is 60 minutes on a CPU and 240 on a GPU."""
    dry_run: bool = False
    """Say what would be trained, and how long it would take; write nothing."""

    def __post_init__(self) -> None:
        require_types(self)
        require(bool(self.against) or not self.until_decided, "--until-decided needs --against: name a run to judge by")
        require(self.minutes >= 0, f"--minutes is {self.minutes:g}: it must not be negative")
        planned_before = "--resume" if self.resume else "--against" if self.against else ""
        require(
            not (self.minutes and planned_before),
            f"--minutes {self.minutes:g} plans a new run, but {planned_before} continues another's flags: name --steps",
        )


@dataclass(frozen=True)
class Wanted:
    """What the user fixes of a plan (--preset auto), by the names of train's flags; None is for the plan to decide."""

    image_channels: int | None = None
    height: int | None = None
    width: int | None = None
    channels: int | None = None
    channel_multipliers: tuple[int, ...] | None = None
    res_blocks: int | None = None
    attention_resolutions: tuple[int, ...] | None = None
    groups: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("device", "precision") or value is None:
                continue
            if f.name in ("channel_multipliers", "attention_resolutions"):
                whole = isinstance(value, tuple) and all(type(number) is int for number in value)
                require(whole, f"{flag(f.name)} is {value!r}: it must be whole numbers")
            else:
                require(type(value) is int, f"{flag(f.name)} is {value!r}: it must be a whole number")
                require(value > 0, f"{flag(f.name)} is {value}: it must be at least 1")


@dataclass(frozen=True)
class SamplingOptions:
    """Which images to make, by number, and how: image 17 of a seed is the same whatever else is asked for."""

    sampler: Literal["auto", SamplerName] = "auto"
    """auto is the run's own, ddpm the paper's; ddim (Song et al. 2021) and dpm++ (DPM-Solver++ 2M) need few steps."""
    steps: int = 0
    """Sampling steps K, 1 to T; 0 is those of the run's own sampler, or all T of one that is named."""
    eta: float = SamplerConfig.eta
    """DDIM's share of fresh noise: 0 is deterministic, 1 as noisy as DDPM. Needs --sampler."""
    spacing: Spacing = SamplerConfig.spacing
    """Which timesteps a shorter sampler visits: trailing always starts from pure noise. Needs --sampler."""
    count: int = 64
    """How many images."""
    seed: int = 0
    """Seed, 0 to 2**64 - 1."""
    first_index: int = 0
    """Number of the first image, 0 to 2**32 - 1."""
    batch_size: int = 64
    """Largest number of images made at once."""
    label: tuple[int, ...] = ()
    """Labels of images 0, 1, ..., over and over, and -1 for one without; left out, a conditional U-Net's in turn."""
    guidance: float = 1.0
    """How strongly to guide, from 1, not at all: by the U-Net itself without the label, or by --guide."""
    guide: str = ""
    """A run or checkpoint, worse than this one, that is to guide it (autoguidance); needs --guidance."""

    def __post_init__(self) -> None:
        require_types(self)
        require(self.guidance >= 0, f"--guidance is {self.guidance}: it must not be negative")
        has_use = not self.guide or self.guidance != 1
        require(has_use, f"--guide {self.guide} has no effect with a --guidance of 1: name one above it, e.g. 2")
        for name in ("eta", "spacing"):
            value, named = getattr(self, name), self.sampler != "auto"
            is_default = value == getattr(SamplerConfig, name)
            require(named or is_default, f"{flag(name)} is {value}: name the --sampler that it is for")
        ignored = self.eta != SamplerConfig.eta and self.sampler not in ("auto", "ddim")
        require(not ignored, f"--eta is {self.eta}: {self.sampler} has no use for it; leave it out, or --sampler ddim")
        for name, least, most in (("count", 1, 2**32), ("batch_size", 1, 2**20), ("first_index", 0, 2**32 - 1)):
            value = getattr(self, name)
            require(least <= value <= most, f"{flag(name)} is {value}: it must lie in {least}..{most}")
        last = self.first_index + self.count - 1
        require(last < 2**32, f"--first-index and --count ask for image {last}: the last of a seed is 2**32 - 1")
        require_seed(self.seed)

    def sampler_for(self, config: Config) -> SamplerConfig:
        """Return the sampler that is meant for a run, with its number of steps."""
        own, total = config.sampling, config.diffusion.timesteps
        if self.sampler == "auto":
            return replace(own, steps=self.steps or min(own.steps or total, total))
        return SamplerConfig(self.sampler, self.steps or total, self.eta, self.spacing)

    @property
    def asked(self) -> str:
        """What a directory's name says of labels and guidance, or "": two wishes that differ must not meet there."""
        labels = "-label" + "_".join(map(str, self.label[:8])) if self.label else ""
        labels += f"-and-{len(self.label) - 8}" if len(self.label) > 8 else ""
        guide = f"-by-{self.guide.strip('/').replace('/', '-')}" if self.guide else ""
        return labels + (f"-guidance{self.guidance:g}{guide}" if self.guidance != 1 else "")


@dataclass(frozen=True)
class LoadOptions:
    """Which weights of a checkpoint to sample from, and how to run them."""

    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last trained weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes an NVIDIA GPU if there is one."""
    precision: Precision = "auto"
    """The U-Net's arithmetic; auto is bf16 on GPUs good at it, else fp32; tf32 is for GPUs."""
    kernels: bool = True
    """Run the Triton kernels on an NVIDIA GPU; --no-kernels is plain PyTorch everywhere."""
    compile: bool = True
    """Compile the U-Net on a GPU, and on a CPU for long sampling; --no-compile runs it as written."""
    capture: bool = True
    """Capture each step on a GPU as a CUDA graph; --no-capture launches every kernel from Python."""

    def __post_init__(self) -> None:
        require_types(self)
