"""Precision and recall of samples (Kynkaanniemi et al. 2019, arXiv 1904.06991, Section 2).

Each set's manifold is the union of balls around its points, each of which reaches to the k-th nearest other point.
Precision is the share of samples in the manifold of the real points: are they like real ones. Recall is the share of
real points in the manifold of the samples: is all there is made. Shapes: N and M points, D values each.
"""

import numpy as np
from numpy.typing import NDArray

from ddpm_fast.quality.distances import Points, blocks

NEIGHBOURS = 3
"""k, the paper's."""


def squared_radii(points: Points, k: int = NEIGHBOURS) -> NDArray[np.float64]:
    """Return each point's squared distance to its k-th nearest other point: [N]; of fewer points, to the farthest."""
    k = min(k, len(points) - 1)
    radii = np.empty(len(points))
    for rows, squares in blocks(points, points):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = 0  # itself: the nearest, but for rounding
        radii[rows] = np.partition(squares, k, axis=1)[:, k]
    return radii


def covered(points: Points, centres: Points, radii: NDArray[np.float64]) -> float:
    """Return the share of points [N, D] that lie in a ball around one of the centres [M, D].

    Args:
        points: asked about.
        centres: of the balls.
        radii: squared, [M].
    """
    return sum(int((squares <= radii).any(axis=1).sum()) for _, squares in blocks(points, centres)) / len(points)


def precision_and_recall(samples: Points, real: Points, real_radii: NDArray[np.float64]) -> tuple[float, float]:
    """Return the precision and the recall of samples [N, D] of real points [M, D], whose squared radii are given."""
    return covered(samples, real, real_radii), covered(real, samples, squared_radii(samples))
