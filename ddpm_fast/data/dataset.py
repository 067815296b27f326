"""Images in: whatever --data names becomes one uint8 store, decoded once, memory-mapped after.

The rule, the same for every source: turn upright (EXIF); convert to the channel count (1 grey, 2 grey and alpha,
3 RGB, 4 RGBA; for 1 and 3 transparency is composited over white); resize, keeping the aspect, until the image just
covers H x W (Lanczos, with antialiasing); cut out the centre. A JPEG much larger than that is read at a reduced scale.
Shapes: M images in the store, N in a batch, C channels, H x W pixels.
"""

import contextlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data import parquet, tar
from ddpm_fast.data.arrays import open_array
from ddpm_fast.data.digits import read_digits
from ddpm_fast.data.folder import digests_of, files_of, picture_folder
from ddpm_fast.data.hub import SHORT_NAMES, hub_name, hub_source
from ddpm_fast.data.image_files import fit
from ddpm_fast.data.labels import Labels
from ddpm_fast.data.parquet import asked_columns, require_extra
from ddpm_fast.data.pictures import Decoded, Source, open_pictures
from ddpm_fast.data.store import STORE_VERSION, Shape, digest
from ddpm_fast.errors import InputError, flag, nearest, require

WHAT = "a folder of images, a .npy, .npz, .parquet or .tar file, or hf:NAME of the Hugging Face hub"
ARRAYS, PARQUET, TAR = (".npy", ".npz"), ".parquet", ".tar"


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
    revision: str = ""
    """The commit that was read, of a data set of the hub."""

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
    source, revision = pictures_of(data, progress)
    if source is not None:
        found = open_pictures(source, shape, data.skip_bad, progress)
    elif data.data == "digits":
        found = _digits(shape)
    else:
        found = open_array(Path(data.data), shape, data.float_range, progress)
    labels = found.labels
    return Dataset(found.images, found.key, data.data, found.skipped, labels.values, labels.classes, revision)


def pictures_of(data: DataConfig, progress: bool = False) -> tuple[Source | None, str]:
    """Return the encoded pictures that --data names, and the commit of the hub's; None for the digits and for an array.

    Raises:
        InputError: there is none, it is of no kind that is read, or it holds no picture.
    """
    if not data.data:
        raise InputError(f"this preset has no data of its own: name --data, {WHAT}")
    if data.data == "digits":
        _require_no_column(data)
        return None, ""
    if (name := hub_name(data.data)) and not _is_there(data.data):
        require_extra(data.data, "huggingface_hub")
        return hub_source(name, data, progress)
    path = _readable(Path(data.data))
    if path.suffix.lower() in ARRAYS and path.is_file():
        _require_no_column(data)
        return None, ""
    return _source(path, data, progress), ""


def _require_no_column(data: DataConfig) -> None:
    for name in ("image_column", "label_column"):
        value = getattr(data, name)
        require(not value, f"{flag(name)} {value} is for .parquet and .tar files: --data {data.data} has no columns")


def _is_there(data: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(data).exists()
    return False


def _readable(path: Path) -> Path:
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise _missing(path, error) from None
    if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        raise InputError(f"--data {path} cannot be read: no permission")
    return path


def _source(path: Path, data: DataConfig, progress: bool) -> Source:
    """Return the encoded pictures of a folder, or of a file or a folder of files that hold many."""
    if path.is_dir() and (files := files_of(path)):
        _require_no_column(data)
        return picture_folder(data.data, path, files, progress)
    for suffix, look_through in (PARQUET, parquet.look_through), (TAR, tar.look_through):
        folder, files = (path, files_of(path, suffix)) if path.is_dir() else (path.parent, [path])
        if files and files[0].suffix.lower() == suffix:
            if suffix == PARQUET:
                require_extra(data.data)
            identity = (*asked_columns(data), *digests_of(folder, files, progress))
            return Source(data.data, identity, partial(look_through, data.data, files, data))
    if path.is_dir():
        raise InputError(f"--data {path} holds no image: name a folder with PNG, JPEG, WebP or other image files")
    raise InputError(f"--data {path} is a file of another kind: name {WHAT}")


def _missing(path: Path, error: OSError | ValueError) -> InputError:
    if not isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return InputError(f"--data {path} cannot be read: {error.strerror}")
    siblings = ["digits", *SHORT_NAMES]
    with contextlib.suppress(OSError, ValueError):
        siblings += [entry.name for entry in path.parent.iterdir()]
    return InputError(f"--data {path} does not exist: name {WHAT}.{nearest(path.name, siblings)}")


def _digits(shape: Shape) -> Decoded:
    images, labels = read_digits()
    if images.shape[1:] != shape:
        images = np.stack([fit(image, shape) for image in images])
    key = digest(repr((shape, STORE_VERSION)).encode(), images)
    return Decoded(images, key, labels=Labels(labels, tuple("0123456789")))
