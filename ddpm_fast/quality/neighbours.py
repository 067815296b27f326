"""How far images are from their nearest training image: memorised ones are nearer than real ones that nobody showed.

Distances are Euclidean over pixels in [-1, 1], and a copy's is exactly 0. Shapes: N and M images, C channels, H x W.
"""

import numpy as np
from numpy.typing import NDArray

from ddpm_fast.progress import Progress
from ddpm_fast.quality.distances import block_length, rows_of, squared_distances

UNIT = 2 / 255
"""A grey level, in [-1, 1]."""


def nearest_distances(
    asked: NDArray[np.uint8],
    images: NDArray[np.uint8],
    itself: NDArray[np.int64] | None = None,
    progress: bool | None = None,
) -> NDArray[np.float64]:
    """Return each image's distance to the nearest one of a set: [N].

    Args:
        asked: [N, H, W, C].
        images: the set, [M, H, W, C], with other images than the one to leave out.
        itself: [N], the number in the set of an image that does not count, where the asked are of the set.
        progress: show a bar, or say a line now and then; None for neither.
    """
    squares = np.full(len(asked), np.inf)
    values = asked[0].size
    asked_at_once = min(len(asked), block_length(values))
    images_at_once = block_length(max(values, asked_at_once))
    numbers = np.full(len(asked), -1) if itself is None else itself
    total = -(-len(asked) // asked_at_once) * len(images)
    with Progress("looking for nearest training images", total, "image", progress, leave=False) as shown:
        for start in range(0, len(asked), asked_at_once):
            part = slice(start, start + asked_at_once)
            points = rows_of(asked[part])
            for first in range(0, len(images), images_at_once):
                near = rows_of(images[first : first + images_at_once])
                found = squared_distances(points, near)
                rows = np.flatnonzero((numbers[part] >= first) & (numbers[part] < first + len(near)))
                found[rows, numbers[part][rows] - first] = np.inf
                squares[part] = np.minimum(squares[part], found.min(axis=1))
                shown.advance(len(near))
    return np.sqrt(squares) * UNIT
