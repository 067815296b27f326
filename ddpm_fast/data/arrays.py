"""A .npy or .npz file to pixels: shapes, dtypes and ranges, and never a pickle."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddpm_fast.errors import InputError

LABELS = "labels"
"""The name of an array in an .npz that says which class each image is of."""


def _load_images(path: Path) -> NDArray[Any]:
    with _readable(path):
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in archive.files if name != LABELS]
            if len(names) != 1:
                found = ", ".join(archive.files) or "none"
                raise InputError(
                    f"--data {path} must hold one array, or one beside {LABELS!r}, not {len(archive.files)} ({found})"
                )
            return archive[names[0]]


def read_labels_array(path: Path) -> NDArray[Any] | None:
    """Return the array "labels" of an .npz; None where there is none.

    Raises:
        InputError: the file cannot be used.
    """
    with _readable(path), np.load(path, allow_pickle=False) as archive:
        return archive[LABELS] if LABELS in archive.files else None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what NumPy raises of a file that is no array, or a pickle, into one line."""
    try:
        yield
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        if any(word in str(error) for word in ("pickle", "Python objects", "Object arrays")):
            raise InputError(f"--data {path} holds pickled objects, which are never loaded: save uint8") from None
        raise InputError(f"--data {path} is empty, truncated or not an array file ({error})") from None


def read_array(path: Path, float_range: Literal["none", "0..1", "-1..1"]) -> NDArray[np.uint8]:
    """Read images of shape (N, H, W[, C]) as [N, H, W, C] uint8.

    Args:
        path: the file.
        float_range: what floats mean; "none" for uint8.

    Raises:
        InputError: the file, its shape, dtype or range cannot be used.
    """
    array = _load_images(path)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape or array.shape[-1] > 4:
        raise InputError(f"--data {path} has shape {array.shape}: it must be (N, H, W) or (N, H, W, C), C from 1 to 4")
    if array.dtype == np.uint8:
        if float_range != "none":
            raise InputError(f"--data {path} is uint8: leave --float-range {float_range} out")
        return array
    if array.dtype.kind != "f":
        raise InputError(f"--data {path} is {array.dtype}: it must be uint8, or floats with --float-range")
    finite = np.isfinite(array)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(f"--data {path} holds {array[where]} at {where}: every value must be finite")
    low, high = float(array.min()), float(array.max())
    if float_range == "none":
        raise InputError(
            f"--data {path} holds floats in [{low:g}, {high:g}]: say with --float-range 0..1 or -1..1 what they mean"
        )
    least = 0.0 if float_range == "0..1" else -1.0
    if low < least or high > 1:
        raise InputError(f"--data {path} spans [{low:g}, {high:g}], which is not within --float-range {float_range}")
    return np.rint((array.astype(np.float64) - least) * (255 / (1 - least))).astype(np.uint8)
