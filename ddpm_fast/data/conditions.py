"""What a conditional U-Net is told of each image of a data set: its label, 0 to classes - 1.

Shapes: M images of the data set.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_fast.config import Config
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.errors import InputError, require


def with_classes(config: Config, dataset: Dataset) -> Config:
    """Return the configuration with --num-classes auto replaced by the number of classes in the data.

    Raises:
        InputError: the images have no labels, or those do not count from 0 without a gap.
    """
    if config.unet.num_classes != "auto":
        return config
    numbers = np.unique(_labels(dataset))
    count = max(len(numbers), len(dataset.classes))  # a class that is named may have no image
    require(
        int(numbers[0]) >= 0 and int(numbers[-1]) < count,
        f"--num-classes auto: {dataset.source} has {len(numbers)} labels from {numbers[0]} to {numbers[-1]}: number "
        "the classes from 0 without a gap, or name as --num-classes one more than the largest label",
    )
    return replace(config, unet=replace(config.unet, num_classes=count))


def class_labels(config: Config, dataset: Dataset) -> NDArray[np.int64] | None:
    """Return each image's label, [M] in 0..classes - 1; None for an unconditional U-Net.

    Raises:
        InputError: the images have no labels, not as many as they are, or one is out of range.
    """
    classes = config.unet.classes
    if not classes:
        return None
    labels = _labels(dataset)
    low, high = int(labels.min()), int(labels.max())
    require(
        low >= 0 and high < classes,
        f"--num-classes {classes}: labels are 0 to {classes - 1}, but those of {dataset.source} are {low} to {high}",
    )
    return labels


def batches_of(config: Config, dataset: Dataset, device: torch.device) -> BatchSource:
    """Return a run's training batches: in its seed's order, without what is held out, and labelled if it is told so."""
    key = key_from_seed(config.training.seed)
    return BatchSource(dataset, key, device, config.data.holdout, class_labels(config, dataset))


def _labels(dataset: Dataset) -> NDArray[np.int64]:
    labels, count = dataset.labels, len(dataset)
    if labels is None:
        raise InputError(
            f"--data {dataset.source} has no labels, which --num-classes needs: one folder per class, or an .npz with "
            'an array "labels" beside the images'
        )
    message = f"--data {dataset.source} has {len(labels)} labels, but {count} images: there must be one for each"
    require(len(labels) == count, message)
    return labels
