"""Images in: whatever --data names becomes one uint8 store, decoded once, memory-mapped after.

The rule, the same for every source: turn upright (EXIF); convert to the channel count (1 grey, 2 grey and alpha,
3 RGB, 4 RGBA; for 1 and 3 transparency is composited over white); resize, keeping the aspect, until the image just
covers H x W (Lanczos, with antialiasing); cut out the centre. A JPEG much larger than that is read at a reduced scale.
Shapes: M images in the store, N in a batch, C channels, H x W pixels.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data.arrays import open_array
from ddpm_fast.data.digits import read_digits
from ddpm_fast.data.folder import files_of, picture_folder
from ddpm_fast.data.image_files import fit
from ddpm_fast.data.labels import Labels
from ddpm_fast.data.pictures import Decoded, open_pictures
from ddpm_fast.data.store import STORE_VERSION, Shape, digest
from ddpm_fast.errors import InputError, nearest


@dataclass(frozen=True)
class Dataset:
    """A data set as the trainer sees it."""

    images: NDArray[np.uint8]
    """[M, H, W, C], memory-mapped."""
    fingerprint: str
    """Hex digest of the content, the shape and the rule."""
    source: str
    """What --data named."""
    skipped: tuple[str, ...] = ()
    """Files that were left out, with the reason."""
    labels: NDArray[np.int64] | None = None
    """Which class each image is of, [M]; None where the data set does not say."""
    classes: tuple[str, ...] = ()
    """What classes 0, 1, ... are called; empty where only their numbers are known."""

    def __len__(self) -> int:
        return len(self.images)


def open_dataset(data: DataConfig, unet: UNetConfig, progress: bool = False) -> Dataset:
    """Open --data for a U-Net's image shape, decoding it into the cache the first time.

    Raises:
        InputError: the source is missing, empty or unusable; every unusable file is counted and the first are named.
    """
    shape = (unet.height, unet.width, unet.image_channels)
    if unet.image_channels > 4:
        raise InputError(
            f"--image-channels is {unet.image_channels}: images have 1 (grey), 2 (and alpha), 3 (RGB) or 4"
        )
    if not data.data:
        raise InputError("this preset has no data of its own: name --data, a folder of images or a .npy/.npz file")
    found = _digits(shape) if data.data == "digits" else _open_path(Path(data.data), shape, data, progress)
    return Dataset(found.images, found.key, data.data, found.skipped, found.labels.values, found.labels.classes)


def _open_path(path: Path, shape: Shape, data: DataConfig, progress: bool) -> Decoded:
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise _missing(path, error) from None
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise InputError(f"--data {path} cannot be read: no permission")
        files = files_of(path)
        if not files:
            raise InputError(f"--data {path} holds no image: name a folder with PNG, JPEG, WebP or other image files")
        return open_pictures(picture_folder(data.data, path, files, progress), shape, data.skip_bad, progress)
    if path.suffix not in (".npy", ".npz"):
        raise InputError(f"--data {path} is a file, but neither .npy nor .npz: name one of those or a folder of images")
    return open_array(path, shape, data.float_range, progress)


def _missing(path: Path, error: OSError | ValueError) -> InputError:
    if not isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return InputError(f"--data {path} cannot be read: {error.strerror}")
    siblings = ["digits"]
    with contextlib.suppress(OSError, ValueError):
        siblings += [entry.name for entry in path.parent.iterdir()]
    meant = nearest(path.name, siblings)
    return InputError(f"--data {path} does not exist: name a folder of images or a .npy/.npz file.{meant}")


def _digits(shape: Shape) -> Decoded:
    images, labels = read_digits()
    if images.shape[1:] != shape:
        images = np.stack([fit(image, shape) for image in images])
    key = digest(repr((shape, STORE_VERSION)).encode(), images)
    return Decoded(images, key, labels=Labels(labels, tuple("0123456789")))
