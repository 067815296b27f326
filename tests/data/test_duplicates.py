"""Near-duplicates are found among unlike images, and unlike ones are none."""

import io

import numpy as np
from PIL import Image

from ddpm_fast.data.digits import read_digits
from ddpm_fast.data.duplicates import near_duplicates, thumbnails


def pictures(count: int) -> np.ndarray:
    """Return smooth pictures of 32x40 in colour, all different."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((40, 32), Image.Resampling.BICUBIC)) for image in coarse])


def compressed(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=90, subsampling=0)
    return np.asarray(Image.open(file))


def test_copies_and_compressed_pictures_are_found_and_nothing_else():
    images = pictures(300)
    assert near_duplicates(images) == []
    images[123] = images[7]
    images[250] = images[7]
    images[200] = compressed(images[150])
    images[299] = np.roll(images[298], 4, axis=1)  # moved: another picture
    assert near_duplicates(images) == [(7, 123), (150, 200), (7, 250)]


def test_flat_images_and_few_ones_are_compared_too():
    assert near_duplicates(np.zeros((3, 4, 4, 1), np.uint8)) == [(0, 1), (0, 2)]
    assert near_duplicates(np.zeros((1, 4, 4, 1), np.uint8)) == []
    assert near_duplicates(read_digits()[0]) == []


def test_thumbnails_are_means_over_areas():
    image = np.arange(16 * 16, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(thumbnails(image).reshape(8, 8), image.reshape(8, 2, 8, 2).mean(axis=(1, 3)))
