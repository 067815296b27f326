"""A contact sheet of what a network is trained on: the first examples of a run, as they come out of the store.

Shapes: N images, C channels, H x W pixels.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ddpm_fast.config import Config
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.runs.grids import captioned, grid, save_picture

IMAGES = 64
"""As many as there are at most: each image is shown once."""


def first_examples(config: Config, dataset: Dataset) -> Tensor:
    """Return the images that a run sees first, in that order and none twice: [N, C, H, W] uint8, before any flip."""
    source = BatchSource(dataset, key_from_seed(config.training.seed), torch.device("cpu"), config.data.holdout)
    return source.batch(0, min(IMAGES, source.order.count))[0]


def contact_sheet(config: Config, dataset: Dataset) -> Image.Image:
    """Return the first examples as one picture, which says under it what it shows."""
    images, unet = first_examples(config, dataset), config.unet
    count = f"the first {len(images)} of {len(dataset):,} images" if len(images) < len(dataset) else "all images"
    shown = grid(images.permute(0, 2, 3, 1).numpy())
    return captioned(shown, f"{count}, as the network sees them: {unet.image_channels} x {unet.height} x {unet.width}")


def write_sheet(run: Path, config: Config, dataset: Dataset) -> None:
    """Write samples/data.png of a run, unless it is there.

    Raises:
        InputError: it cannot be written.
    """
    path = run / "samples" / "data.png"
    if not path.exists():
        save_picture(path, contact_sheet(config, dataset))
