"""Precision, recall and nearest neighbours on points whose answers are known, and by brute force."""

import numpy as np
import pytest

from ddpm_fast.quality import distances
from ddpm_fast.quality.manifold import covered, precision_and_recall, squared_radii
from ddpm_fast.quality.neighbours import nearest_distances

RANDOM = np.random.default_rng(0)


@pytest.fixture(params=[2**24, 40])
def _blocks(request, monkeypatch):
    """In one block, and in many small ones."""
    monkeypatch.setattr(distances, "BLOCK_VALUES", request.param)


def line(*places: float) -> np.ndarray:
    return np.array(places, dtype=float)[:, None]


@pytest.mark.usefixtures("_blocks")
def test_radii_reach_to_the_third_nearest_other_point():
    assert np.sqrt(squared_radii(line(0, 1, 3, 6, 10))).tolist() == [6, 5, 3, 5, 9]
    assert np.sqrt(squared_radii(line(0, 2))).tolist() == [2, 2]  # there is no third


@pytest.mark.usefixtures("_blocks")
def test_samples_among_few_of_the_real_points_have_precision_and_no_recall():
    real = line(0, 1, 2, 3, 100, 101, 102, 103)
    samples = line(0.5, 1.0, 1.5, 2.0)  # radii 1.5, 1, 1, 1.5: from -1 to 3.5
    assert precision_and_recall(samples, real, squared_radii(real)) == (1.0, 0.5)
    outside = line(0.5, 50, 51, 52)  # radii 51.5 and so on: they cover what they are not among
    assert precision_and_recall(outside, real, squared_radii(real)) == (0.25, 1.0)
    assert covered(line(5, 200), line(4, 150), np.array([1.0, 4.0])) == 0.5


@pytest.mark.usefixtures("_blocks")
def test_copies_have_both():
    real = RANDOM.standard_normal((50, 5))
    assert precision_and_recall(real, real, squared_radii(real)) == (1.0, 1.0)


@pytest.mark.usefixtures("_blocks")
def test_nearest_neighbours_are_those_of_brute_force():
    asked, images = (RANDOM.integers(0, 256, (n, 3, 5, 2)).astype(np.uint8) for n in (7, 23))
    a, b = (pixels.reshape(len(pixels), -1) / 127.5 - 1 for pixels in (asked, images))
    apart = np.array([[np.linalg.norm(x - y) for y in b] for x in a])
    np.testing.assert_allclose(nearest_distances(asked, images), apart.min(axis=1), rtol=1e-12)
    within = np.array([[np.linalg.norm(x - y) for y in b] for x in b]) + np.diag(np.full(23, np.inf))
    rows = np.array([0, 5, 22])
    np.testing.assert_allclose(nearest_distances(images[rows], images, rows), within.min(axis=1)[rows], rtol=1e-12)


@pytest.mark.usefixtures("_blocks")
def test_a_copy_is_at_no_distance_at_all():
    images = RANDOM.integers(0, 256, (23, 8, 8, 3)).astype(np.uint8)
    assert nearest_distances(images[::-1], images).tolist() == [0.0] * 23
