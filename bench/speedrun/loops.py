"""Who races: the engine, and a plain diffusers loop as shipped or with the engine's recipe.

Shapes: M images, C channels, H x W pixels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.peers.diffusers import noise_scheduler, unet
from ddpm_fast.config import Config, DiffusionConfig, TrainingConfig
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.runs.decisions import decide

OURS, PLAIN, RECIPE = "ddpm-fast", "diffusers", "diffusers, our recipe"


class Loop(Protocol):
    """A way to train; what it has learnt can be sampled by the engine, whose parameters have diffusers' names."""

    config: Config
    """What it trains, and how its weights are to be sampled."""

    def step(self) -> None:
        """Take one optimizer step, and wait for it."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """Return a copy of the weights to sample from, by name."""
        ...


class Ours:
    """The engine, as `ddpm-fast train` runs it."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        """Take the recipe and what it trains on."""
        decided = decide(config.training)
        self.config, device = config, torch.device(decided.device)
        source = BatchSource(dataset, key_from_seed(config.training.seed, "cpu"), device, config.data.holdout)
        self.trainer = Trainer(config, source.batch, device, decided.execution)
        if decided.compiled:
            self.trainer.compile()  # once on a machine, and kept: not training

    def step(self) -> None:
        self.trainer.train_step_no_sync()
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()

    def weights(self) -> Mapping[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.trainer.ema.items()}


class Diffusers:
    """The loop of diffusers' tutorial around its UNet2DModel: AdamW, a schedule of its own, and its EMA."""

    def __init__(self, config: Config, images: NDArray[np.uint8], decay: float | None) -> None:
        """Prepare to train.

        Args:
            config: network, diffusion and training.
            images: [M, H, W, C], all that is trained on.
            decay: of the average; None: diffusers' own, which rises with the steps.
        """
        from diffusers.training_utils import EMAModel

        self.config, training = config, config.training
        self.device = torch.device(decide(training).device)
        torch.manual_seed(training.seed)
        self.model: nn.Module = unet(config.unet).to(self.device).train()
        self.scheduler = noise_scheduler(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=training.learning_rate, weight_decay=1e-6)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share_of_rate)
        self.ema = EMAModel(self.model.parameters(), decay=decay or 0.9999, use_ema_warmup=decay is None)
        on_device = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device)
        self.batches = _shuffled(on_device.float() / 127.5 - 1, training.batch_size)

    def _share_of_rate(self, step: int) -> float:
        training = self.config.training
        rising = min(1.0, (step + 1) / max(training.warmup_steps, 1))
        falling = (training.steps - step) / max(training.cooldown_steps, 1) if training.cooldown_steps else 1.0
        return rising * min(1.0, max(falling, 0.0))

    def loss(self) -> Tensor:
        """Return the next batch's loss: []."""
        images, prediction = next(self.batches), self.config.diffusion.prediction
        noise = torch.randn_like(images)
        t = torch.randint(0, self.config.diffusion.timesteps, (len(images),), device=self.device)
        x_t = self.scheduler.add_noise(images, noise, t)
        target = self.scheduler.get_velocity(images, noise, t) if prediction == "v" else noise
        return F.mse_loss(self.model(x_t, t).sample, images if prediction == "x0" else target)

    def step(self) -> None:
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.clip_norm)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        loss.item()  # its progress bar shows the loss of every step

    def weights(self) -> Mapping[str, Tensor]:
        names = [name for name, _ in self.model.named_parameters()]
        return {name: shadow.clone() for name, shadow in zip(names, self.ema.shadow_params, strict=True)}


def _shuffled(images: Tensor, size: int) -> Iterator[Tensor]:
    """Yield batches without end; each epoch in an order of its own, the rest that fills no batch left out."""
    while True:
        order = torch.randperm(len(images), device=images.device)
        for first in range(0, max(1, len(images) - size + 1), size):
            yield images[order[first : first + size]]


def plain(config: Config) -> Config:
    """Return what a plain loop trains: the paper's linear schedule and eps, at a rate for small networks, no end."""
    training = TrainingConfig(steps=2**31 - 1, batch_size=64, learning_rate=1e-3, warmup_steps=100)
    training = replace(training, seed=config.training.seed, device=config.training.device)
    return replace(config, diffusion=DiffusionConfig(), training=training)


def build(name: str, config: Config, dataset: Dataset, trained_on: NDArray[np.uint8]) -> Loop:
    """Build one of the loops by its name, on the recipe's network and seed."""
    builders: dict[str, Any] = {
        OURS: lambda: Ours(config, dataset),
        PLAIN: lambda: Diffusers(plain(config), trained_on, decay=None),
        RECIPE: lambda: Diffusers(config, trained_on, decay=config.training.ema_decay),
    }
    return builders[name]()
