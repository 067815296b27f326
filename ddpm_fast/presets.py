"""The presets: what a run is unless flags say otherwise."""

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, SamplerConfig, TrainingConfig, UNetConfig
from ddpm_fast.errors import InputError, nearest, require

_PAPER_256 = UNetConfig(height=256, width=256, channel_multipliers=(1, 1, 2, 2, 4, 4))
_FAST = DiffusionConfig(schedule="cosine", prediction="v", variance="small")


def _in_minutes(steps: int) -> TrainingConfig:
    """Return how a small network learns most within minutes of a CPU's time."""
    return TrainingConfig(
        steps=steps,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=50,
        cooldown=0.5,
        timestep_density="laplace",
        ema_decay=0.995,
        save_every=steps // 2,
        sample_every=steps // 2,
    )


PRESETS: dict[str, Config] = {
    # Small networks for two CPU cores; profiles/speedrun.md says what each choice is worth.
    # 1,797 handwritten digits of 8x8 in half a minute. One ResBlock per level gave the best samples in that time.
    "digits": Config(
        preset="digits",
        unet=UNetConfig(1, 8, 8, 32, (1, 2), res_blocks=1, attention_resolutions=(4,), groups=8),
        diffusion=_FAST,
        data=DataConfig(data="digits"),
        training=_in_minutes(700),
        sampling=SamplerConfig("dpm++", 20),
    ),
    # Thousands of larger digits, or sketches, in minutes: attention at 7x7 alone, which every U-Net has in its middle.
    "mnist": Config(
        preset="mnist",
        unet=UNetConfig(1, 28, 28, 16, (1, 2, 4), res_blocks=1, attention_resolutions=(), groups=8),
        diffusion=_FAST,
        training=_in_minutes(2000),
        sampling=SamplerConfig("dpm++", 10),
    ),
    # A thousand or two of small pictures in minutes: of 1,431 emoji it learns colours and outlines, and no details yet.
    # What it affords it spends at 4x4 and 8x8, where it costs least.
    "icons32": Config(
        preset="icons32",
        unet=UNetConfig(3, 32, 32, 16, (1, 2, 4, 4), res_blocks=1, attention_resolutions=(8,), groups=8),
        diffusion=_FAST,
        training=_in_minutes(1500),
        sampling=SamplerConfig("dpm++", 20),
    ),
    # Ho et al. 2020, Appendix B.
    "cifar10": Config(preset="cifar10", unet=UNetConfig(dropout=0.1), data=DataConfig(flip=True)),
    # The paper's network and data for the first ten million images, a twelfth of its training, on one GPU; unmeasured.
    # From the digits' ladder: v, cosine, cooldown and laplace, which was published at 256x256 (Hang et al. 2025) and is
    # a guess here. From the literature: the batch, and a rate between the paper's and EDM's (Karras et al. 2022: 1e-3
    # for 512 images). No dropout, which pays in longer runs; an average with a half-life of 2% of the run.
    "cifar10-fast": Config(
        preset="cifar10-fast",
        diffusion=_FAST,
        data=DataConfig(flip=True),
        training=TrainingConfig(
            steps=40_000,
            batch_size=256,
            learning_rate=5e-4,
            warmup_steps=2000,
            cooldown=0.5,
            timestep_density="laplace",
            ema_decay=0.999,
        ),
        sampling=SamplerConfig("dpm++", 20),
    ),
    "church256": Config(
        preset="church256",
        unet=_PAPER_256,
        diffusion=DiffusionConfig(variance="small"),
        data=DataConfig(flip=True),
        training=TrainingConfig(steps=1_200_000, batch_size=64, learning_rate=2e-5),
    ),
    "celebahq256": Config(
        preset="celebahq256",
        unet=_PAPER_256,
        diffusion=DiffusionConfig(variance="small"),
        data=DataConfig(flip=True),
        training=TrainingConfig(steps=500_000, batch_size=64, learning_rate=2e-5),
    ),
}


AUTO = Config(
    preset="auto",
    diffusion=DiffusionConfig(schedule="cosine", prediction="v", variance="small"),
    training=TrainingConfig(cooldown=0.5, timestep_density="laplace"),
    sampling=SamplerConfig("dpm++", 20),
)
"""What all plans for the images of --data share, the recipe of `digits`; the rest is planned, see `runs.plan`."""


def preset(name: str) -> Config:
    """Return the preset of that name.

    Raises:
        InputError: there is none; the nearest name is suggested.
    """
    if name == AUTO.preset:
        return AUTO
    if name not in PRESETS:
        known = [*PRESETS, AUTO.preset]
        raise InputError(f"unknown preset {name!r}: the presets are {', '.join(known)}.{nearest(str(name), known)}")
    return PRESETS[name]


def plans(preset: str | None, data: str, minutes: float) -> bool:
    """Return whether a new run is planned by its images: where that is asked for, or they are given without a preset.

    Raises:
        InputError: a time is given for another preset's run, or there are no images.
    """
    if preset is not None and preset != AUTO.preset:
        require(not minutes, f"--minutes {minutes:g} fits a plan to a time: leave --preset {preset} or --minutes out")
        return False
    asked = bool(preset or minutes)
    require(bool(data) or not asked, "a run is planned by its images: name --data, a folder or a .npy/.npz file")
    return asked or data not in ("", "digits")
