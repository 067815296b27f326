"""Which class each image is of, where the data set says so: samples are judged by it, and nothing is trained on it."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_fast.config import DataConfig
from ddpm_fast.data.arrays import LABELS, read_labels_array
from ddpm_fast.data.digits import read_digits
from ddpm_fast.errors import InputError


def read_labels(data: DataConfig, count: int) -> NDArray[np.int64] | None:
    """Return the labels of a data set of so many images, [count]; None where it has none.

    The built-in digits have some, and an .npz that holds an array "labels" beside the images.

    Raises:
        InputError: they cannot be read, are not one whole number per image, or not of that many images.
    """
    if data.data == "digits":
        return read_digits()[1]
    path = Path(data.data)
    labels = read_labels_array(path) if path.suffix == ".npz" and path.is_file() else None
    if labels is None:
        return None
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(
            f"--data {path}: its {LABELS!r} is {labels.dtype} of shape {labels.shape}: it must hold one whole "
            f"number for each of the {count} images; correct it or leave it out"
        )
    return labels.astype(np.int64)
