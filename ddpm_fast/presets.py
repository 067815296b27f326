"""The presets: what a run is unless flags say otherwise."""

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, SamplerConfig, TrainingConfig, UNetConfig
from ddpm_fast.errors import InputError, nearest

_PAPER_256 = UNetConfig(height=256, width=256, channel_multipliers=(1, 1, 2, 2, 4, 4))

PRESETS: dict[str, Config] = {
    # 1,797 handwritten digits of 8x8, in half a minute on two CPU cores; profiles/speedrun.md says what each choice
    # is worth. One ResBlock per level gave the best samples in that time.
    "digits": Config(
        preset="digits",
        unet=UNetConfig(1, 8, 8, 32, (1, 2), res_blocks=1, attention_resolutions=(4,), groups=8),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v", variance="small"),
        data=DataConfig(data="digits"),
        training=TrainingConfig(
            steps=700,
            batch_size=32,
            learning_rate=2e-3,
            warmup_steps=50,
            cooldown=0.5,
            timestep_density="laplace",
            ema_decay=0.995,
            save_every=350,
            sample_every=350,
        ),
        sampling=SamplerConfig("dpm++", 20),
    ),
    "mnist": Config(
        preset="mnist",
        unet=UNetConfig(1, 28, 28, channels=64, channel_multipliers=(1, 2, 2), attention_resolutions=(14,)),
        training=TrainingConfig(steps=40_000, warmup_steps=1000, ema_decay=0.999),
    ),
    # Ho et al. 2020, Appendix B.
    "cifar10": Config(preset="cifar10", unet=UNetConfig(dropout=0.1), data=DataConfig(flip=True)),
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


def preset(name: str) -> Config:
    """Return the preset of that name.

    Raises:
        InputError: there is none; the nearest name is suggested.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: the presets are {', '.join(PRESETS)}.{nearest(str(name), PRESETS)}")
    return PRESETS[name]
