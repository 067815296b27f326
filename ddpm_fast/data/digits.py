"""The built-in images: scikit-learn's 1,797 handwritten digits, and which digit each is."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def read_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the digits, their 17 grey levels spread over 0..255, [M, 8, 8, 1], and their labels 0..9, [M]."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(file) as lines:  # as its `load_digits` does, without the seconds that importing scikit-learn takes
        rows = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    pixels = rows[:, :-1].reshape(-1, 8, 8, 1)
    return np.rint(pixels * (255 / 16)).astype(np.uint8), rows[:, -1].astype(np.int64)
