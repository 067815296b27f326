"""The built-in images: 1,797 handwritten digits, and which digit each is. digits.txt says whose they are."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).with_name("digits.npz")


def read_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the digits, their 17 grey levels spread over 0..255, [M, 8, 8, 1], and their labels 0..9, [M]."""
    with np.load(FILE, allow_pickle=False) as arrays:
        return np.rint(arrays["images"][..., None] * (255 / 16)).astype(np.uint8), arrays["labels"].astype(np.int64)
