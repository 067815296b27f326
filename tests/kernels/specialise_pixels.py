"""How the presets launch q_sample, noise_mse, reverse_step and timestep_embedding (see `compile_all`).

Shapes: N images, C channels, H x W pixels, T timesteps, K sampling steps.
"""

from collections.abc import Iterator
from itertools import product

import torch
from compile_all import CONFIGS, Launch, Specialisation, record, specialise
from torch import Tensor

from ddpm_fast.config import Config, SamplerConfig
from ddpm_fast.constants import SAMPLER_COLUMN, TRAINING_COLUMN
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_backward
from ddpm_fast.kernels.q_sample import q_sample
from ddpm_fast.kernels.reverse_step import reverse_step
from ddpm_fast.kernels.timestep_embedding import timestep_embedding
from ddpm_fast.presets import PRESETS

SAMPLERS = (SamplerConfig("ddpm"), SamplerConfig("ddim"), SamplerConfig("dpm++"))
BULK_LOADS = ("images_ptr", "prediction_ptr", "x_ptr", "x0_ptr")
BULK_STORES = ("x_t_ptr", "grad_prediction_ptr", "x_ptr", "x0_ptr", "model_input_ptr")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def words(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def images(config: Config, dtype: torch.dtype) -> Tensor:
    """Return a batch [N, C, H, W] as the training data and the U-Net lie in memory, NHWC."""
    unet, N = config.unet, config.training.batch_size // config.training.accumulate
    return empty(N, unet.height, unet.width, unet.image_channels, dtype=dtype).permute(0, 3, 1, 2)


def training(config: Config, dtype: torch.dtype) -> Iterator[Launch]:
    """Yield what a training step launches."""
    batch, T, flip = images(config, torch.uint8), config.diffusion.timesteps, config.data.flip
    N, prediction = len(batch), images(config, dtype)
    lookups = words(N), empty(T, len(TRAINING_COLUMN)), words(2), words(N)
    yield from record(q_sample, batch, *lookups, flip=flip, dtype=dtype)
    yield from record(noise_mse, prediction, batch, *lookups, flip=flip)
    yield from record(noise_mse_backward, empty(N), prediction, batch, *lookups, flip=flip)
    yield from record(timestep_embedding, words(N), config.unet.channels)


def sampling(config: Config, sampler: SamplerConfig, dtype: torch.dtype) -> Iterator[Launch]:
    """Yield what a sampling step, and the preparation of all of them, launches."""
    table = sampler_table(config.diffusion, sampler)
    x, K = images(config, torch.float32), len(table.rows)
    yield from record(
        reverse_step, x, images(config, dtype), empty(K, len(SAMPLER_COLUMN)), words(1), words(2), words(len(x)),
        clip=table.clip, noisy=table.noisy, x0=x if table.multistep else None,
        model_input=None if dtype == torch.float32 else images(config, dtype),
    )  # fmt: skip
    yield from record(timestep_embedding, empty(K), config.unet.channels)


def expected(launch: Launch) -> tuple[int, int]:
    """Return the bytes of images that a thread loads and stores, tensors counted where it has 16 bytes of them."""
    given = launch.arguments
    if "BLOCK" not in given:
        return 0, 0
    lanes = 4 if given["C"] == 3 else given["C"]
    places = given["BLOCK"] * lanes // (32 * given["num_warps"])

    def moved(names: tuple[str, ...]) -> int:
        return sum(places * given[n].element_size() // 16 * 16 for n in names if given.get(n) is not None)

    return moved(BULK_LOADS), moved(BULK_STORES)


def describe(launch: Launch) -> str:
    """Name what tells launches of a kernel apart."""
    given = launch.arguments
    shown = [
        f"{name}={given[name]}" for name in ("C", "HW", "elements", "MIRROR", "CLIP", "NOISY", "half") if name in given
    ]
    data = next((given[n] for n in ("x_t_ptr", "prediction_ptr", "t_ptr") if n in given), None)
    kind = "" if data is None else str(data.dtype).removeprefix("torch.")
    return " ".join([kind, *shown, *(["x0"] if given.get("x0_ptr") is not None else [])])


def specialisations() -> Iterator[Specialisation]:
    for config, dtype in product(CONFIGS, (torch.float32, torch.bfloat16)):
        launches = [*training(config, dtype), *(one for s in SAMPLERS for one in sampling(config, s, dtype))]
        for launch in launches:
            yield specialise(launch, describe(launch), *expected(launch))


def planted() -> list[Specialisation]:
    """Return a kernel that must spill: what finds no spills elsewhere finds these."""
    launch = next(training(PRESETS["cifar10"], torch.float32))
    return [specialise(launch, "planted spill")._replace(options=(("maxnreg", 24),))]
