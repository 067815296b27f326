"""Euclidean distances between two sets of points, block by block, so that no whole matrix is in memory.

Shapes: N points, M points, D values each.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
BLOCK_VALUES = 2**24
"""Values of a block, 128 MB in float64."""


def rows_of(images: NDArray[np.uint8]) -> Points:
    """Return images [N, H, W, C] as points [N, D] of 0..255: their inner products are whole numbers, and exact."""
    return images.reshape(len(images), -1).astype(np.float64)


def block_length(values: int) -> int:
    """Return how many rows of so many values a block takes, at least 1."""
    return max(1, BLOCK_VALUES // max(values, 1))


def squared_distances(a: Points, b: Points) -> Points:
    """Return |a - b|^2 of all pairs: [N, M], from inner products, never negative."""
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)
    return np.maximum(squares, 0, out=squares)


def blocks(a: Points, b: Points) -> Iterator[tuple[slice, Points]]:
    """Yield the squared distances of some rows of `a` to all of `b`, with which rows these are."""
    length = block_length(len(b))
    for first in range(0, len(a), length):
        rows = slice(first, min(first + length, len(a)))
        yield rows, squared_distances(a[rows], b)
