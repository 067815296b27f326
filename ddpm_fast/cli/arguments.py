"""The flags of each command, as dataclasses: tyro makes the parser and its help from them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ddpm_fast.config import Config, Precision, SamplerConfig, Spacing
from ddpm_fast.errors import InputError
from ddpm_fast.presets import PRESETS


@dataclass(frozen=True)
class TrainArguments:
    """Train a U-Net. --preset is read first and gives the defaults of all other flags."""

    config: Config = field(default_factory=lambda: PRESETS["digits"])
    out: str = ""
    """Run directory, which must not exist or be empty; default runs/PRESET-N with the next free N."""
    resume: bool = False
    """Continue from the newest whole checkpoint of --out; flags left out come from its config.json."""


@dataclass(frozen=True)
class SampleArguments:
    """Make images from a trained run, by number: image 17 of a seed is the same whatever else is asked for."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Run directory, or one of its checkpoints/step-*."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """How many images."""
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm"
    """ddpm is the paper's; ddim (Song et al. 2021) and dpm++ (DPM-Solver++ 2M) need far fewer steps."""
    steps: int = 0
    """Sampling steps, 1 to T; 0 is all T."""
    eta: float = 0.0
    """DDIM's share of fresh noise, 0 to 1."""
    spacing: Spacing = "trailing"
    """Which timesteps a sampler of fewer steps visits."""
    seed: int = 0
    """Seed, 0 to 2**64 - 1."""
    first_index: int = 0
    """Number of the first image, 0 to 2**32 - 1."""
    batch_size: int = 64
    """Largest number of images made at once."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last trained weights."""
    out: str = ""
    """Directory to write to; default RUN/samples/SAMPLER-STEPS-seedSEED."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes an NVIDIA GPU if there is one."""
    precision: Precision = "auto"
    """The U-Net's arithmetic; auto is bf16 on GPUs good at it, else fp32; tf32 is for GPUs."""
    kernels: bool = True
    """Run the Triton kernels on a GPU where they are the faster way; --no-kernels is plain PyTorch everywhere."""
    compile: bool = True
    """Compile the U-Net on a GPU, and on a CPU for long sampling; --no-compile runs it as written."""
    capture: bool = True
    """Capture each step on a GPU as a CUDA graph; --no-capture launches every kernel from Python."""
    animate: bool = False
    """Also write animation.gif: up to 16 images on their way from noise."""

    def __post_init__(self) -> None:
        for name, least, most in (("count", 1, 2**32), ("batch_size", 1, 2**20), ("first_index", 0, 2**32 - 1)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise InputError(f"--{name.replace('_', '-')} is {value}: it must lie in {least}..{most}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"--seed is {self.seed}: it must lie in 0..2**64-1")

    def sampler_config(self) -> SamplerConfig:
        return SamplerConfig(self.sampler, self.steps, self.eta, self.spacing)


@dataclass(frozen=True)
class CheckArguments:
    """Check the mathematics of a trained run, or of what the train flags describe."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RUN]")] = ""
    """A run directory; left out, the flags below are checked."""
    config: Config = field(default_factory=lambda: PRESETS["digits"])
