"""Configurations that are all valid, as unlike each other as can be, and data for them: each a function of a number."""

from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.presets import PRESETS

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def make(number: int, directory: Path) -> Config:
    """Draw a configuration, and write its data below a directory."""
    random = Random(number)
    unet = _unet(random)
    data = _data(random, unet, directory)
    preset = random.choice((*PRESETS, "none"))
    return Config(preset, unet, _diffusion(random), data, _training(random))


def _unet(random: Random) -> UNetConfig:
    levels, res_blocks = random.choice(((1, 1), (1, 1), (1, 1), (1, 2), (2, 1), (2, 1), (2, 2), (3, 1), (4, 1)))
    groups, step = random.choice((1, 2, 3, 4, 5, 8)), 2 ** (levels - 1)
    channels = groups * random.choice((1, 2, 4))
    height, width = (step * random.choice((1, 2, 3, 4, 5, 7)) for _ in range(2))
    resolutions = sorted({height >> level for level in range(levels)})
    return UNetConfig(
        image_channels=random.choice((1, 2, 3, 3, 4)),
        height=height,
        width=width,
        channels=channels * (1 + channels % 2),
        channel_multipliers=tuple(random.choice((1, 1, 2, 3)) for _ in range(levels)),
        res_blocks=res_blocks,
        attention_resolutions=tuple(resolution for resolution in resolutions if random.random() < 0.4),
        dropout=random.choice((0.0, 0.0, 0.01, 0.1, 0.3, 0.5, 0.9)),
        groups=groups,
    )


def _diffusion(random: Random) -> DiffusionConfig:
    start = 10 ** random.uniform(-6, -2)
    start, end = random.choice(((1e-4, 0.02), (start, min(0.5, start * 10 ** random.uniform(0, 3)))))
    return DiffusionConfig(
        timesteps=random.choice((1, 2, 3, 5, 10, 20, 50, 50, 100, 100, 100, 200, 250, 400, 400, 600, 1000, 1000, 4000)),
        schedule=random.choice(("linear", "cosine", "sigmoid")),
        beta_start=start,
        beta_end=end,
        prediction=random.choice(("eps", "x0", "v")),
        variance=random.choice(("small", "large")),
        clip=random.random() < 0.6,
    )


def _training(random: Random) -> TrainingConfig:
    accumulate = random.choice((1, 1, 1, 2, 3, 4))
    return TrainingConfig(
        batch_size=accumulate * random.choice((1, 2, 3, 5, 16, 32)),
        accumulate=accumulate,
        learning_rate=10 ** random.uniform(-5.5, -2.5),
        warmup_steps=random.choice((0, 0, 1, 2, 7, 100, 5000, 50_000)),
        clip_norm=random.choice((0.0, 1.0, 1.0, 1e-3, 0.1, 100.0)),
        ema_decay=random.choice((0.0, 0.5, 0.9, 0.995, 0.9999, 0.999999)),
        timestep_density=random.choice(("uniform", "uniform", "laplace")),
        min_snr_gamma=random.choice((0.0, 0.0, 0.5, 1.0, 5.0, 20.0)),
        seed=random.choice((0, 1, 17, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64 - 2, random.randrange(2**64))),
        device="cpu",
        precision=random.choice(("auto", "fp32")),
        steps=random.choice((1, 3, 100, 800_000)),
        cooldown=random.choice((0.0, 0.0, 0.01, 0.2, 1.0)),
        adam_beta2=random.choice((0.999, 0.999, 0.1, 0.95, 0.99, 0.9999)),
    )


def _pixels(random: Random, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    noise = np.random.default_rng(random.randrange(2**32)).integers(0, 256, shape)
    looks = {
        "noise": noise,
        "one grey": np.full(shape, random.randrange(256)),
        "black": np.zeros(shape),
        "white": np.full(shape, 255),
        "ramp": np.broadcast_to(np.linspace(0, 255, shape[2])[:, None], shape),
        "two greys": 127 + noise % 2,
        "mirror images of themselves": np.maximum(noise, noise[:, :, ::-1]),
    }
    return looks[random.choice(("noise", *looks))].astype(np.uint8)


def _data(random: Random, unet: UNetConfig, directory: Path) -> DataConfig:
    kind, flip = random.choice(("digits", "none", "0..1", "-1..1", "folder")), random.random() < 0.5
    if kind == "digits":
        return DataConfig("digits", flip=flip)
    size = random.choice(((unet.height, unet.width), (random.randrange(1, 40), random.randrange(1, 40))))
    channels = random.choice((unet.image_channels, 1, 3, 4))
    pixels = _pixels(random, (random.choice((1, 2, 3, 7, 19, 20, 21, 64)), *size, channels))
    if kind == "folder":
        for i, image in enumerate(pixels):
            Image.fromarray(image[..., 0] if channels == 1 else image, MODES[channels]).save(directory / f"{i}.png")
        return DataConfig(str(directory), flip=flip)
    floats = {"none": pixels, "0..1": pixels / np.float32(255), "-1..1": pixels / np.float32(127.5) - 1}
    np.save(directory / "images.npy", floats[kind])
    return DataConfig(str(directory / "images.npy"), kind, flip=flip)
