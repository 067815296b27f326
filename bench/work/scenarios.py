"""What of ddpm_fast is measured: the one file that knows how the engine's loops and training steps are built.

A benchmark asks for a scenario by configuration and variant. Variants that the installed engine or this device does
not offer are left out by `variants`. Shapes: N images, C channels, H x W pixels, K steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from ddpm_fast.config import Config, SamplerConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import Execution, choose_dtype
from ddpm_fast.engine.sampling import GRAPH_STEPS, SamplingLoop
from ddpm_fast.engine.trainer import WARM_UP_STEPS, Trainer, new_unet
from ddpm_fast.presets import PRESETS

CONFIGURATIONS: dict[str, Config] = {
    "digits": PRESETS["digits"],
    # Twice the preset's side: the small U-Net that the first comparisons with other trainers were made on.
    "digits-16x16": Config(
        preset="digits",
        unet=UNetConfig(1, 16, 16, 32, (1, 2, 2), res_blocks=2, attention_resolutions=(8,)),
        training=TrainingConfig(batch_size=64),
    ),
    "cifar10": PRESETS["cifar10"],
    "church256": PRESETS["church256"],
    # To try bench/ itself.
    "tiny": Config(
        unet=UNetConfig(1, 8, 8, 8, (1, 2), res_blocks=1, attention_resolutions=(4,), groups=4),
        training=TrainingConfig(batch_size=2),
    ),
}
"""The networks that are measured, by name."""

Mode = Literal["eager", "compiled", "captured"]


@dataclass(frozen=True)
class Variant:
    """How the engine runs: who computes the ops, and who launches them."""

    kernels: bool
    """Triton kernels, or the reference in plain PyTorch."""
    mode: Mode
    """eager: from Python; compiled: by torch.compile; captured: compiled and replayed as CUDA graphs."""
    graph_steps: int = GRAPH_STEPS
    """Sampling steps in one captured graph."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms for each convolution, instead of choosing by rule."""

    def __str__(self) -> str:
        graph = f"-{self.graph_steps}-step-graph" if self.graph_steps != GRAPH_STEPS else ""
        benchmark = "-cudnn-benchmark" if self.cudnn_benchmark else ""
        return f"{self.mode}-{'kernels' if self.kernels else 'reference'}{graph}{benchmark}"

    @property
    def execution(self) -> Execution:
        """The engine's word for the mode."""
        return Execution(compiled=self.mode != "eager", captured=self.mode == "captured")


def variants(device: torch.device) -> list[Variant]:
    """Return the variants that the engine offers on a device, the simplest first; a CPU has no kernels, no graphs."""
    modes: list[Mode] = ["eager", "compiled", "captured"] if device.type == "cuda" else ["eager", "compiled"]
    return [Variant(k, mode) for mode in modes for k in ([False, True] if device.type == "cuda" else [False])]


def default_variant(device: torch.device) -> Variant:
    """Return what a user gets who asks for nothing: everything on a GPU, the eager reference on a CPU."""
    offered = variants(device)
    return offered[-1] if device.type == "cuda" else offered[0]


def warm_up_calls(variant: Variant, training: bool) -> int:
    """Return how many calls of a scenario go before timing: a loop captures itself in its first, a trainer later."""
    if not training or variant.mode == "eager":
        return 1
    return WARM_UP_STEPS + 2 if variant.mode == "captured" else 3


@contextmanager
def _cudnn_benchmark(wanted: bool) -> Iterator[None]:
    """Set what cuDNN chooses by only where a variant asks for it: elsewhere the engine decides."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Scenario:
    """One thing that a user waits for."""

    work: Callable[[], object]
    """Does it once."""
    images: int
    """Images that one call trains on or makes."""
    steps: int
    """Optimizer steps or sampling steps of one call."""
    unet: UNetConfig
    training: bool


def loop_dtype(device: torch.device) -> torch.dtype:
    """Return the U-Net's arithmetic that a user gets on a device."""
    return choose_dtype("auto", device)


def synthetic_batches(unet: UNetConfig, device: torch.device, count: int = 2048) -> BatchSource:
    """Return training batches of random images: speed does not depend on what they show."""
    shape = (count, unet.height, unet.width, unet.image_channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return BatchSource(Dataset(images, fingerprint="", source="random"), key_from_seed(0, device), device)


def train_step(config: Config, batch: int, variant: Variant, device: torch.device) -> Scenario:
    """Build one optimizer step: gather, augment, noise, forward, loss, backward, clip, Adam, EMA."""
    config = with_training(config, batch_size=batch, device=device.type, kernels=variant.kernels)
    trainer = Trainer(config, synthetic_batches(config.unet, device).batch, device, variant.execution)

    def work() -> None:
        with _cudnn_benchmark(variant.cudnn_benchmark):
            trainer.train_step_no_sync()

    return Scenario(work, batch, 1, config.unet, training=True)


def sampling(config: Config, batch: int, steps: int, variant: Variant, device: torch.device) -> Scenario:
    """Build one batch of the paper's sampler over K of its T steps; every call makes other images."""
    unet = new_unet(with_training(config, kernels=variant.kernels), device)
    table = sampler_table(config.diffusion, SamplerConfig(steps=steps))
    loop = SamplingLoop(unet, table, loop_dtype(device), variant.execution, graph_steps=variant.graph_steps)
    key, numbers = key_from_seed(0, device), torch.arange(batch, device=device)

    def work() -> object:
        numbers.add_(batch)
        with _cudnn_benchmark(variant.cudnn_benchmark):
            return loop.run(NoiseAddress(key, numbers))

    return Scenario(work, batch, steps, config.unet, training=False)


def with_image_size(config: Config, side: int) -> Config:
    """Return the configuration for images of another size; attention stays at the levels it had."""
    scale = side / config.unet.height
    resolutions = tuple(round(resolution * scale) for resolution in config.unet.attention_resolutions)
    return replace(config, unet=replace(config.unet, height=side, width=side, attention_resolutions=resolutions))
