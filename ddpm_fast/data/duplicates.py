"""Images of a store that look the same, found by their thumbnails: copies, and the same picture compressed twice.

Shapes: M images, C channels, H x W pixels; thumbnails are [M, 8 * 8 * C].
"""

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import from_numpy

THUMBNAIL = 8
"""Pixels, in height and width, that images are averaged to."""
ALIKE, AS_BRIGHT = 6.0, 1.0
"""Levels of 255 by which no pixel of two thumbnails of the same picture differs, nor the mean of all."""
MOST_PAIRS = 5_000_000
"""Thumbnails are compared with those next in brightness, and in very large sets not with all of the same one."""
CHUNK = 1024
"""Images that are averaged at once."""


def thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Average images [M, H, W, C] over 8 x 8 areas; smaller ones are repeated."""
    found = [
        F.adaptive_avg_pool2d(from_numpy(np.array(images[i : i + CHUNK])).permute(0, 3, 1, 2).float(), THUMBNAIL)
        for i in range(0, len(images), CHUNK)
    ]
    return np.concatenate([part.flatten(1).numpy() for part in found])


def near_duplicates(images: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Return pairs of images [M, H, W, C] that look the same: each that is like an earlier one, with the first such.

    Returns:
        (earlier, later), in the order of the later ones.
    """
    small = thumbnails(images)
    brightness = small.mean(axis=1)
    order = np.argsort(brightness, kind="stable")
    small, brightness = small[order], brightness[order]
    first = dict[int, int]()
    for apart in range(1, min(len(order), 1 + max(1, MOST_PAIRS // max(1, len(order))))):
        near = np.flatnonzero(brightness[apart:] - brightness[:-apart] <= AS_BRIGHT)
        if not len(near):
            break
        for start in range(0, len(near), 16 * CHUNK):
            rows = near[start : start + 16 * CHUNK]
            alike = rows[(np.abs(small[rows] - small[rows + apart]) <= ALIKE).all(axis=1)]
            for one, other in zip(order[alike].tolist(), order[alike + apart].tolist(), strict=True):
                earlier, later = sorted((one, other))
                first[later] = min(earlier, first.get(later, earlier))
    return sorted(((earlier, later) for later, earlier in first.items()), key=lambda pair: pair[1])
