"""A .npy or .npz file to a store: shapes, dtypes and ranges, and never a pickle."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddpm_fast.data.image_files import fit
from ddpm_fast.data.labels import NO_LABELS, Labels
from ddpm_fast.data.pictures import Decoded
from ddpm_fast.data.store import STORE_VERSION, Shape, build, cached, digest, in_parallel, read_back
from ddpm_fast.errors import InputError

LABELS, CLASSES = "labels", "classes"
"""Names of arrays in an .npz: which class each image is of, and what the classes are called."""
CHUNK = 1024
"""Images that are looked at at once."""

FloatRange = Literal["none", "0..1", "-1..1"]


@dataclass(frozen=True)
class ArrayImages:
    """Images [M, h, w, C] of a file that may be larger than memory: each becomes uint8 when it is asked for."""

    array: NDArray[Any]
    least: float | None
    """What stands for black, where 1 stands for white; None where they are uint8."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        image = self.array[i]
        if self.least is None:
            return image
        scaled = (image.astype(np.float64) - self.least) * (255 / (1 - self.least))
        return np.rint(scaled).astype(np.uint8)


def open_array(path: Path, shape: Shape, float_range: FloatRange, progress: bool) -> Decoded:
    """Copy an array's images, resized where they have another shape, into the cache, and map them there.

    A copy, also of what could be mapped as it is: nobody else writes to it while a run reads it.

    Raises:
        InputError: the file, its shape, dtype, range or labels cannot be used, or it changes while it is read.
    """
    images = read_array(path, float_range)
    labels = read_labels(path, len(images))
    as_it_is = images.shape[1:] == shape and isinstance(images.array, np.memmap) and images.array.flags.c_contiguous
    rule = repr((shape, STORE_VERSION) if as_it_is and images.least is None else (images.shape, shape, STORE_VERSION))
    key = digest(rule.encode(), images)
    if cached(key, len(images), shape) is None:

        def fill(store: NDArray[np.uint8]) -> None:
            in_parallel("resizing", lambda i: np.copyto(store[i], fit(images[i], shape)), len(images), progress)
            copied = store if images.shape[1:] == shape else images
            if digest(rule.encode(), copied) != key:
                raise InputError(f"--data {path} was changed while it was read: try again")

        build(key, len(images), shape, fill)
    return Decoded(read_back(key, len(images), shape), key, labels=labels)


def _load_images(path: Path) -> NDArray[Any]:
    with _readable(path):
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("an .npz file: call it so")
            return array
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in archive.files if name not in (LABELS, CLASSES)]
            if len(names) != 1:
                found = ", ".join(archive.files) or "none"
                raise InputError(
                    f"--data {path} must hold one array, or one beside {LABELS!r}, not {len(archive.files)} ({found})"
                )
            return archive[names[0]]


def read_labels(path: Path, count: int) -> Labels:
    """Return what an .npz says of its images' classes, where it does.

    Raises:
        InputError: it cannot be read, or is not one whole number per image.
    """
    if path.suffix.lower() != ".npz":
        return NO_LABELS
    with _readable(path), np.load(path, allow_pickle=False) as archive:
        values = archive[LABELS] if LABELS in archive.files else None
        classes = archive[CLASSES] if CLASSES in archive.files else np.empty(0)
    if values is None:
        return NO_LABELS
    if values.dtype.kind not in "iu" or values.shape != (count,):
        raise InputError(
            f"--data {path}: its {LABELS!r} is {values.dtype} of shape {values.shape}: it must hold one whole "
            f"number for each of the {count} images; correct it or leave it out"
        )
    return Labels(values.astype(np.int64), tuple(str(name) for name in classes.ravel()))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what NumPy raises of a file that is no array, or a pickle, into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of damaged files NumPy, zipfile and the parser of headers raise whatever they meet
        if any(word in str(error) for word in ("pickle", "Python objects", "Object arrays")):
            raise InputError(f"--data {path} holds pickled objects, which are never loaded: save uint8") from None
        reason = str(error) or type(error).__name__
        raise InputError(f"--data {path} is empty, truncated or not an array file ({reason})") from None


def read_array(path: Path, float_range: FloatRange) -> ArrayImages:
    """Open images of shape (N, H, W[, C]).

    Args:
        path: the file; an .npz is read whole, a .npy is mapped.
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
        return ArrayImages(array, None)
    if array.dtype.kind != "f":
        raise InputError(f"--data {path} is {array.dtype}: it must be uint8, or floats with --float-range")
    low, high = _range_of(path, array)
    if float_range == "none":
        raise InputError(
            f"--data {path} holds floats in [{low:g}, {high:g}]: say with --float-range 0..1 or -1..1 what they mean"
        )
    least = 0.0 if float_range == "0..1" else -1.0
    if low < least or high > 1:
        raise InputError(f"--data {path} spans [{low:g}, {high:g}], which is not within --float-range {float_range}")
    return ArrayImages(array, least)


def _range_of(path: Path, array: NDArray[Any]) -> tuple[float, float]:
    """Return the least and the greatest value, all of which must be finite."""
    low, high = np.inf, -np.inf
    for first in range(0, len(array), CHUNK):
        chunk = array[first : first + CHUNK]
        finite = np.isfinite(chunk)
        if not finite.all():
            found = tuple(int(i) for i in np.argwhere(~finite)[0])
            where = (first + found[0], *found[1:])
            raise InputError(f"--data {path} holds {array[where]} at {where}: every value must be finite")
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    return low, high
