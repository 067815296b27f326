"""Labels that a conditional U-Net is told: counted, refused where they do not fit, and taken with their images."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm_fast.config import Config, UNetConfig
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.conditions import class_labels, with_classes
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.errors import InputError

IMAGES = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1)


def dataset(labels: list[int] | None, classes: tuple[str, ...] = ()) -> Dataset:
    return Dataset(IMAGES, "", "here", labels=None if labels is None else np.array(labels), classes=classes)


def config(num_classes: object) -> Config:
    return Config(unet=replace(UNetConfig(), num_classes=num_classes))  # pyright: ignore[reportArgumentType]


def test_auto_counts_the_classes():
    assert with_classes(config("auto"), dataset([0, 1, 2, 3, 0, 1, 2])).unet.num_classes == 4
    assert with_classes(config("auto"), dataset([0, 1, 0, 1, 0, 1, 0], ("a", "b", "c"))).unet.num_classes == 3
    assert with_classes(config(9), dataset(None)).unet.num_classes == 9
    with pytest.raises(ValueError, match="auto"):
        print(config("auto").unet.classes)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (None, "here has no labels, which --num-classes needs"),
        ([0, 1, 2], "here has 3 labels, but 7 images"),
        ([0, 1, 3, 0, 1, 3, 0], "3 labels from 0 to 3: number the classes from 0"),
        ([-1, 0, 1, 0, 1, 0, 1], "3 labels from -1 to 1: number the classes from 0"),
    ],
)
def test_labels_that_cannot_be_counted_are_refused(labels, sentence):
    with pytest.raises(InputError, match=sentence):
        with_classes(config("auto"), dataset(labels))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (None, "no labels"),
        ([0, 1, 2], "3 labels, but 7 images"),
        ([0, 1, 2, 3, 0, 1, 2], "--num-classes 3: labels are 0 to 2, but those of here are 0 to 3"),
        ([0, 1, 2, -1, 0, 1, 2], "--num-classes 3: labels are 0 to 2, but those of here are -1 to 2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, sentence):
    with pytest.raises(InputError, match=sentence):
        class_labels(config(3), dataset(labels))


def test_an_unconditional_network_needs_none():
    assert class_labels(config(0), dataset(None)) is None


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_labels_come_with_their_images(holdout):
    labels = np.array([3, 1, 4, 1, 5, 2, 6])
    source = BatchSource(dataset(None), key_from_seed(0), torch.device("cpu"), holdout, labels)
    for first, n in ((0, 3), (4, 9), (100, 1)):
        images, numbers, told = source.batch(first, n)
        assert torch.equal(numbers, torch.arange(first, first + n))
        assert told.tolist() == labels[images[:, 0, 0, 0].numpy()].tolist()
    assert len(BatchSource(dataset(None), key_from_seed(0), torch.device("cpu")).batch(0, 2)) == 2


@pytest.mark.gpu
def test_labels_of_images_that_are_copied_ahead_are_on_the_gpu(monkeypatch):
    monkeypatch.setattr("ddpm_fast.data.batches.DEVICE_SHARE", 2**60)
    source = BatchSource(dataset(None), key_from_seed(0), torch.device("cuda"), 0, np.arange(7))
    images, _, told = source.batch(3, 5)
    assert (told.device.type, told.tolist()) == ("cuda", images[:, 0, 0, 0].tolist())
