"""The Frechet distance against closed forms, scipy's matrix square root, and a measured value of digits."""

import numpy as np
import pytest
import scipy.linalg

from ddpm_fast.data.digits import read_digits
from ddpm_fast.quality.frechet import COMPONENTS, Gaussian, PixelSpace, frechet_distance, gaussian

RANDOM = np.random.default_rng(0)


def covariance(size: int) -> np.ndarray:
    factor = RANDOM.standard_normal((size, size))
    return factor @ factor.T + 0.1 * np.eye(size)


def test_of_diagonal_gaussians_it_is_the_distance_of_means_and_of_deviations():
    a = Gaussian(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.array([3.0, 1.0, -2.0]), np.diag([16.0, 4.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + 16 + (1 - 4) ** 2 + 0 + (3 - 0) ** 2, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


@pytest.mark.parametrize("size", [1, 3, 31])
def test_it_is_what_a_matrix_square_root_and_what_eigenvalues_give(size):
    a, b = (Gaussian(RANDOM.standard_normal(size), covariance(size)) for _ in range(2))
    means, traces = np.sum((a.mean - b.mean) ** 2), np.trace(a.covariance + b.covariance)
    root = np.trace(scipy.linalg.sqrtm(a.covariance @ b.covariance)).real
    eigenvalues = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real).sum()
    assert frechet_distance(a, b) == pytest.approx(means + traces - 2 * root, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(means + traces - 2 * eigenvalues, rel=1e-9)


def test_fewer_points_than_values_give_no_nan():
    points = RANDOM.standard_normal((2, 64))
    few = gaussian(points)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, gaussian(points + 1)) == pytest.approx(64)
    assert np.isfinite(frechet_distance(few, gaussian(np.ones((5, 64)))))


def test_two_halves_of_digits_are_apart_by_what_was_measured_elsewhere():
    images, _ = read_digits()
    order = np.random.default_rng(0).permutation(len(images))
    space = PixelSpace(images)
    halves = [gaussian(space(images[rows])) for rows in (order[:898], order[898:1796])]
    assert frechet_distance(*halves) == pytest.approx(0.29, abs=0.06)  # over five other splits: 0.24 to 0.32


def principal_axes(points: np.ndarray) -> np.ndarray:
    centred = points - points.mean(axis=0)
    return np.linalg.svd(centred, full_matrices=False)[2][:COMPONENTS]


@pytest.mark.parametrize("most", [4096, 100])
def test_larger_images_are_compared_by_their_first_principal_components(monkeypatch, most):
    monkeypatch.setattr("ddpm_fast.quality.frechet.MOST_VALUES", most)  # 100: from as many of the images alone
    smooth = RANDOM.standard_normal((200, 6)) @ RANDOM.standard_normal((6, 12 * 10 * 1))
    images = (smooth * 20 + RANDOM.standard_normal((200, 120)) * 2 + 128).clip(0, 255).astype(np.uint8)
    images = images.reshape(200, 12, 10, 1)
    found = PixelSpace(images)(images)
    pixels = images.reshape(200, -1) / 127.5 - 1
    counted = pixels if most == 4096 else pixels[np.linspace(0, 199, 100).astype(int)]
    axes = principal_axes(counted)
    assert found.shape == (200, COMPONENTS)
    expected = pixels @ axes.T @ axes  # whatever the axes' order and sign, they span one space
    axes_found = np.linalg.lstsq(pixels, found, rcond=None)[0]
    np.testing.assert_allclose(axes_found.T @ axes_found, np.eye(COMPONENTS), atol=1e-8)
    np.testing.assert_allclose(found @ axes_found.T, expected, atol=1e-8)
