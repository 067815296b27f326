"""The Frechet distance of two sets of points, each taken for a Gaussian (Dowson & Landau 1982; Heusel et al. 2017).

Shapes: N images or points, D values each, H x W pixels, C channels.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from ddpm_fast.quality.distances import Points, block_length, rows_of

COMPONENTS = 64
"""Values of an image that are compared: all, or else so many of its first principal components."""
MOST_VALUES = 4096
"""Up to so many values an image, the components follow from all images; else from so many images, evenly chosen."""


@dataclass(frozen=True)
class Gaussian:
    """The first two moments of a set of points."""

    mean: NDArray[np.float64]
    """[D]"""
    covariance: NDArray[np.float64]
    """[D, D], of N - 1 degrees of freedom."""


def gaussian(points: Points) -> Gaussian:
    """Return the moments of points [N, D], N at least 2."""
    return Gaussian(points.mean(axis=0), np.atleast_2d(np.cov(points, rowvar=False)))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return L with L L^T = covariance, which may be singular."""
    values, vectors = scipy.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(min=0))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    With A = L L^T and B = R R^T, tr (A B)^(1/2) is the sum of L^T R's singular values. That holds for singular
    covariances too, as those of digits, whose corners are always black, where a matrix square root loses its accuracy.
    """
    overlap = np.sum(scipy.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)))
    apart = float(np.square(a.mean - b.mean).sum())
    return max(0.0, apart + float(np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap))


class PixelSpace:
    """Where images are compared by their pixels: all of them in [-1, 1], or the first principal components."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        """Take the real images [N, H, W, C], whose components count."""
        values = images[0].size
        self._axes = None if values <= COMPONENTS else _principal_axes(images, values)

    def __call__(self, images: NDArray[np.uint8]) -> Points:
        """Return images as points [N, D], D at most COMPONENTS."""
        length = block_length(images[0].size)
        parts = []
        for first in range(0, len(images), length):
            pixels = rows_of(images[first : first + length]) * (2 / 255) - 1
            parts.append(pixels if self._axes is None else pixels @ self._axes)
        return np.concatenate(parts)


def _principal_axes(images: NDArray[np.uint8], values: int) -> NDArray[np.float64]:
    """Return the directions in which images vary most, orthonormal: [values, at most COMPONENTS]."""
    count = len(images)
    if values > MOST_VALUES:
        chosen = rows_of(images[np.linspace(0, count - 1, min(count, MOST_VALUES)).astype(int)])
        return scipy.linalg.svd(chosen - chosen.mean(axis=0), full_matrices=False)[2][:COMPONENTS].T
    length, total, products = block_length(values), np.zeros(values), np.zeros((values, values))
    for first in range(0, count, length):
        pixels = rows_of(images[first : first + length])
        total += pixels.sum(axis=0)
        products += pixels.T @ pixels
    covariance = products - np.outer(total, total) / count
    return scipy.linalg.eigh(covariance, subset_by_index=(values - COMPONENTS, values - 1))[1]
