"""Numbers as training and sampling really draw them, caught where the network would receive them.

A listener stands in the network's place, and tables that keep only the image or only the noise in place of the run's:
so nothing in between goes unseen.
Shapes: N examples or images, C = 4 channels (one for each word of Philox), H x W pixels, S sampling steps.
"""

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_fast.config import Config, UNetConfig, with_training
from ddpm_fast.constants import SAMPLER_COLUMN, TrainingTable
from ddpm_fast.diffusion import samplers
from ddpm_fast.engine import sampling
from ddpm_fast.engine.trainer import Trainer, new_unet
from ddpm_fast.errors import MathematicsError
from ddpm_fast.ops import Ops

CHANNELS = 4
MOST_IMAGES = 2**13
"""Of which is seen what becomes of them: enough to count flips."""
SAMPLING_STEPS = 3
OTHER_SEEDS = (1, 1 << 32)
"""Differences to the run's seed: one of its low word, one of its high word."""
IMAGE = torch.arange(CHANNELS * 6, dtype=torch.uint8).view(CHANNELS, 2, 3) * 11
"""[C, 2, 3]: every pixel differs from all others, so that mirroring and exchanged channels show."""


def with_least_unet(config: Config, shape: tuple[int, int, int], more_seed: int = 0) -> Config:
    """Return a run's configuration with a network as small as can be, for images [C, H, W], and another seed."""
    unet = UNetConfig(*shape, channels=2, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=1)
    seed = (config.training.seed + more_seed) % 2**64
    return with_training(replace(config, unet=unet), seed=seed, precision="fp32")


def no_batch(first: int, n: int) -> tuple[Tensor, ...]:
    """Stand in for data where none is read."""
    raise AssertionError("nothing is read here")


@dataclass(frozen=True)
class TrainingDraws:
    """What training draws for examples 0..N-1."""

    t: Tensor
    """[N] as the U-Net is told it."""
    eps: Tensor
    """[N, C, H, W] as it is added to the images."""
    x_start: Tensor
    """[min(N, MOST_IMAGES), C, 2, 3], what becomes of so many times `IMAGE`."""
    losses: Tensor
    """[N] of predicting zeros where eps is the target."""


class _Listener:
    """Stands where the U-Net stands: keeps what it is given, and predicts zeros."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.x_t = self.t = torch.empty(0)
        self.options = dict[str, object]()

    def __call__(self, x_t: Tensor, t: Tensor, **options: object) -> Tensor:
        self.x_t, self.t, self.options = x_t, t, options
        return torch.zeros_like(x_t)


class TrainingProbe:
    """A run's trainer with a listener for a network, and perhaps another seed."""

    def __init__(self, config: Config, device: torch.device, more_seed: int = 0) -> None:
        small = with_training(with_least_unet(config, (CHANNELS, 1, 1), more_seed), batch_size=1, accumulate=1)
        self.trainer = Trainer(small, no_batch, device)
        self.listener = _Listener(self.trainer.unet.ops)
        self.trainer.flat.network = self.listener  # pyright: ignore[reportAttributeAccessIssue]
        self.rows = len(self.trainer.table) + 8  # for a t that is too high

    def draw(self, size: tuple[int, int], count: int) -> TrainingDraws:
        """Draw what training draws for `count` examples of H x W pixels."""
        self._diffuse(IMAGE, min(count, MOST_IMAGES), signal=1.0, noise=0.0)
        x_start = self.listener.x_t
        losses = self._diffuse(torch.full((CHANNELS, *size), 255, dtype=torch.uint8), count, signal=0.0, noise=1.0)
        return TrainingDraws(self.listener.t, self.listener.x_t, x_start, losses)

    def with_flip(self, flip: bool) -> "TrainingProbe":
        """Mirror images, or none, from now on."""
        config = self.trainer.config
        self.trainer.config = replace(config, data=replace(config.data, flip=flip))
        return self

    def _diffuse(self, image: Tensor, count: int, signal: float, noise: float) -> Tensor:
        """Have the trainer compute the losses of one image many times over, by a table of one and the same row."""
        device, row = self.trainer.device, TrainingTable(signal, noise, 1.0, 0.0, 1.0)
        self.trainer.table = torch.tensor([row], device=device).repeat(self.rows, 1)
        images = image.to(device).permute(1, 2, 0).expand(count, -1, -1, -1).contiguous().permute(0, 3, 1, 2)
        return self.trainer._losses_of_batch(images, torch.arange(count, device=device))


class LabelProbe:
    """A conditional run's trainer with a listener for a network: what it is told of labels."""

    def __init__(self, config: Config, device: torch.device) -> None:
        small = with_training(with_least_unet(config, (1, 1, 1)), batch_size=1, accumulate=1)
        small = replace(small, unet=replace(small.unet, num_classes=config.unet.classes))
        self.trainer = Trainer(small, no_batch, device)
        self.listener = _Listener(self.trainer.unet.ops)
        self.trainer.flat.network = self.listener  # pyright: ignore[reportAttributeAccessIssue]
        self.key = self.trainer.key

    def draw(self, labels: Tensor) -> Tensor:
        """Return what the network is told of examples 0..N-1 whose labels [N] these are."""
        images = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8, device=labels.device)
        self.trainer._losses_of_batch(images, torch.arange(len(labels), device=labels.device), labels)
        told = self.listener.options.get("labels")
        return told if isinstance(told, Tensor) else torch.full_like(labels, -1)


class SamplingProbe:
    """A sampling loop of which nothing but the noise is left."""

    def __init__(self, config: Config, device: torch.device) -> None:
        small = with_least_unet(config, (CHANNELS, config.unet.height, config.unet.width))
        rows = torch.zeros(SAMPLING_STEPS + 1, len(SAMPLER_COLUMN), dtype=torch.float64)
        rows[:, SAMPLER_COLUMN.noise] = 1
        self.loop = sampling.SamplingLoop(new_unet(small, device), samplers.SamplerTable(rows, clip=False))
        self.loop.functions = self.loop.functions._replace(denoise=self._listen)
        self.seed, self.seen = small.training.seed, list[Tensor]()

    def _listen(self, x: Tensor, shifts: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.zeros_like(x)

    def draw(self, count: int, more_seed: int = 0) -> Tensor:
        """Return x_T and the noise of each step of images 0..N-1, in two batches: [1 + S, N, C, H, W]."""
        self.seen.clear()
        images = sampling.ImageRange((self.seed + more_seed) % 2**64, 0, count)
        with contextlib.suppress(MathematicsError):  # what is not finite is found among the numbers
            sampling.sample(self.loop, images, count // 2)
        halves = torch.stack(self.seen).unflatten(0, (2, -1))  # [2, 1 + S, N / 2, C, H, W]
        return torch.cat(list(halves), dim=1)
