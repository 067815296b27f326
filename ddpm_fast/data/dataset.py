"""Images in: a folder, an array or the built-in digits become one uint8 store, decoded once, memory-mapped after.

The rule, the same for every source: turn upright (EXIF); convert to the channel count (1 grey, 2 grey and alpha,
3 RGB, 4 RGBA; for 1 and 3 transparency is composited over white); resize, keeping the aspect, until the image just
covers H x W (Lanczos, with antialiasing); cut out the centre.
Shapes: M images in the store, N in a batch, C channels, H x W pixels.
"""

import contextlib
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data import contents
from ddpm_fast.data.arrays import read_array
from ddpm_fast.data.digits import read_digits
from ddpm_fast.data.image_files import Unusable, decode, fit, is_picture
from ddpm_fast.errors import InputError, nearest
from ddpm_fast.files import cache_directory, whole
from ddpm_fast.progress import Progress

Result = TypeVar("Result")

STORE_VERSION = 1
"""Part of the cache's key: raise it when the rule above changes."""
NAMED = 5
"""How many unusable files an error names one by one."""


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
    if data.data == "digits":
        return _in_memory(read_digits()[0], shape, data.data)
    path = Path(data.data)
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise _missing(path, error) from None
    if path.is_dir():
        return _open_folder(path, shape, data, progress)
    if path.suffix not in (".npy", ".npz"):
        raise InputError(f"--data {path} is a file, but neither .npy nor .npz: name one of those or a folder of images")
    return _open_array(path, shape, data, progress)


def _missing(path: Path, error: OSError | ValueError) -> InputError:
    if not isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return InputError(f"--data {path} cannot be read: {error.strerror}")
    siblings = ["digits"]
    with contextlib.suppress(OSError, ValueError):
        siblings += [entry.name for entry in path.parent.iterdir()]
    meant = nearest(path.name, siblings)
    return InputError(f"--data {path} does not exist: name a folder of images or a .npy/.npz file.{meant}")


def _digest(*parts: bytes | NDArray[np.uint8]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update((len(part) if isinstance(part, bytes) else part.nbytes).to_bytes(8, "little"))
        # An array goes image by image: it may be a mapped file larger than memory.
        for chunk in (part,) if isinstance(part, bytes) else part:
            digest.update(bytes(chunk))
    return digest.hexdigest()


def _in_memory(images: NDArray[np.uint8], shape: tuple[int, int, int], source: str) -> Dataset:
    if images.shape[1:] != shape:
        images = np.stack([fit(image, shape) for image in images])
    return Dataset(images, _digest(repr((shape, STORE_VERSION)).encode(), images), source)


def _cached(key: str, count: int, shape: tuple[int, int, int]) -> NDArray[np.uint8] | None:
    """Map a store of the cache; None when it is missing, torn or not of this shape."""
    try:
        images = np.load(cache_directory() / f"{key}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    mapped = isinstance(images, np.memmap)  # else an .npz in disguise
    return images if mapped and images.shape == (count, *shape) and images.dtype == np.uint8 else None


def _build(key: str, count: int, shape: tuple[int, int, int], fill: Callable[[NDArray[np.uint8]], None]) -> None:
    """Write a store into the cache, whole or not at all."""
    path = cache_directory() / f"{key}.npy"
    with whole(path, remedy="set XDG_CACHE_HOME elsewhere") as temporary:
        store = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(count, *shape))
        if hasattr(os, "posix_fallocate"):  # a full disk shows here, and not as SIGBUS in a page of a sparse file
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        fill(store)
        store.flush()


def _in_parallel(what: str, work: Callable[[int], Result], count: int, progress: bool) -> list[Result]:
    """Return work(0) .. work(count - 1)."""
    results = list[Result]()
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(os.cpu_count()) as workers,
        Progress(what, count, "image", progress) as shown,
    ):
        # Filters belong to the process: without this one around all threads, a thread that restores its own would
        # let another's decompression bomb through. Its pattern keeps `decode`'s filter from replacing it.
        warnings.filterwarnings("error", message=".*", category=Image.DecompressionBombWarning)
        try:
            for result in workers.map(work, range(count)):
                results.append(result)
                shown.advance()
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)  # or all that is left would be done first
            raise
    return results


def _open_array(path: Path, shape: tuple[int, int, int], data: DataConfig, progress: bool) -> Dataset:
    images = read_array(path, data.float_range)
    if images.shape[1:] == shape and isinstance(images, np.memmap) and images.flags.c_contiguous:
        return Dataset(images, _digest(repr((shape, STORE_VERSION)).encode(), images), data.data)
    key = _digest(repr((images.shape, shape, STORE_VERSION)).encode(), images)
    if _cached(key, len(images), shape) is None:

        def fill(store: NDArray[np.uint8]) -> None:
            _in_parallel("resizing", lambda i: np.copyto(store[i], fit(images[i], shape)), len(images), progress)

        _build(key, len(images), shape, fill)
    return _opened(key, len(images), shape, data.data, ())


def _opened(key: str, count: int, shape: tuple[int, int, int], source: str, skipped: tuple[str, ...]) -> Dataset:
    images = _cached(key, count, shape)
    if images is None:
        raise InputError(f"{cache_directory() / key}.npy cannot be read back: remove it and try again")
    return Dataset(images[: count - len(skipped)], key, source, skipped)


def _open_folder(path: Path, shape: tuple[int, int, int], data: DataConfig, progress: bool) -> Dataset:
    if not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"--data {path} cannot be read: no permission")
    files = sorted(file for file in path.rglob("*") if is_picture(file) and file.is_file())
    if not files:
        raise InputError(f"--data {path} holds no image: name a folder with PNG, JPEG, WebP or other image files")
    digests = contents.digests(path, files, lambda work, count: _in_parallel("reading", work, count, progress))
    names = (os.fsencode(file.relative_to(path)) for file in files)
    key = _digest(repr((shape, STORE_VERSION)).encode(), *names, *digests)
    try:  # the list of unusable files, found out by decoding, is kept beside the store
        skipped = tuple(map(str, json.loads((cache_directory() / f"{key}.skipped").read_text())))
    except (OSError, ValueError, TypeError):
        skipped = None
    if skipped is None or _cached(key, len(files), shape) is None:
        skipped = _decode_all(path, files, key, shape, data.skip_bad, progress)
    _refuse_unusable(path, skipped, len(files), data.skip_bad)
    return _opened(key, len(files), shape, data.data, skipped)


def _refuse_unusable(path: Path, skipped: tuple[str, ...], total: int, skip_bad: bool) -> None:
    if not skipped or (skip_bad and len(skipped) < total):
        return
    more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    remedy = "none is left" if len(skipped) == total else "repair or remove them, or leave them out with --skip-bad"
    raise InputError(
        f"--data {path}: {len(skipped)} of {total} images cannot be used: {'; '.join(skipped[:NAMED])}{more}; {remedy}"
    )


def _reason(file: Path, shape: tuple[int, int, int], row: NDArray[np.uint8]) -> str:
    """Decode a file into a row [H, W, C] of the store; return "", or why it cannot be used."""
    try:
        row[:] = fit(decode(file), shape)
    except Unusable as reason:
        return str(reason)
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they stumble over
        return f"{type(error).__name__}: {error}"
    return ""


def _decode_all(
    path: Path, files: list[Path], key: str, shape: tuple[int, int, int], skip_bad: bool, progress: bool
) -> tuple[str, ...]:
    """Decode every file into the cache, usable ones in front; return the others' reasons. Refusing leaves nothing."""
    skipped: list[str] = []

    def fill(store: NDArray[np.uint8]) -> None:
        reasons = _in_parallel("decoding", lambda i: _reason(files[i], shape, store[i]), len(files), progress)
        lines = [f"{file.relative_to(path)} ({reason})" for file, reason in zip(files, reasons, strict=True) if reason]
        # A name may hold line breaks, and bytes that are not text.
        skipped.extend("".join(c if c.isprintable() else "?" for c in line) for line in lines)
        _refuse_unusable(path, tuple(skipped), len(files), skip_bad)
        usable = [i for i, reason in enumerate(reasons) if not reason]
        for row, source in enumerate(usable if skipped else ()):
            store[row] = store[source]
        (cache_directory() / f"{key}.skipped").write_text(json.dumps(skipped))

    _build(key, len(files), shape, fill)
    return tuple(skipped)
