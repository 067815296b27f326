"""The uint8 store: images [M, H, W, C] as one file of the cache, written whole or not at all, memory-mapped after.

A store's name is a digest of what it was made of, and its file is only ever replaced by another: who maps it keeps what
it mapped, and two processes that write the same one at once both end up with it.
Shapes: M images in the store, C channels, H x W pixels.
"""

import contextlib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_fast.errors import InputError
from ddpm_fast.files import cache_directory, clear_left_overs_of_the_dead, whole
from ddpm_fast.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")
Shape = tuple[int, int, int]
"""Of an image: H, W, C."""

STORE_VERSION = 1
"""Part of every key: raise it when the rule of `dataset` changes."""
AT_ONCE = 4096
"""Items that wait for a core at most: a waiting one takes a kilobyte."""


def digest(*parts: Any) -> str:
    """Return a hex digest of bytes and of arrays [M, ...] uint8, which are read image by image: they may be mapped."""
    total = hashlib.blake2b(digest_size=20)
    for part in parts:
        size = len(part) if isinstance(part, bytes) else int(np.prod(part.shape, dtype=object))
        total.update(size.to_bytes(8, "little"))
        for chunk in (part,) if isinstance(part, bytes) else part:
            total.update(bytes(chunk))
    return total.hexdigest()


def cached(key: str, count: int, shape: Shape) -> NDArray[np.uint8] | None:
    """Map a store of the cache; None when it is missing, torn or not of this shape."""
    try:
        images = np.load(cache_directory() / f"{key}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    mapped = isinstance(images, np.memmap)  # else an .npz in disguise
    return images if mapped and images.shape == (count, *shape) and images.dtype == np.uint8 else None


def read_back(key: str, count: int, shape: Shape) -> NDArray[np.uint8]:
    """Map a store that was there, or was written, a moment ago.

    Raises:
        InputError: it is no longer.
    """
    images = cached(key, count, shape)
    if images is None:
        raise InputError(f"{cache_directory() / key}.npy cannot be read back: remove it and try again")
    return images


def build(key: str, count: int, shape: Shape, fill: Callable[[NDArray[np.uint8]], None]) -> None:
    """Write a store into the cache, whole or not at all; what others were killed at, gigabytes maybe, makes room first.

    Raises:
        InputError: it cannot be written, or `fill` raised it; nothing is left behind.
    """
    clear_left_overs_of_the_dead(cache_directory())
    with whole(cache_directory() / f"{key}.npy", remedy="set XDG_CACHE_HOME elsewhere") as temporary:
        store = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(count, *shape))
        if hasattr(os, "posix_fallocate"):  # a full disk shows here, and not as SIGBUS in a page of a sparse file
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        fill(store)
        store.flush()


@contextlib.contextmanager
def all_cores(
    what: str, count: int, progress: bool
) -> Iterator[Callable[[Callable[[Item], Result], Sequence[Item]], list[Result]]]:
    """Yield a function that does `work(item)` for each item on all cores, in order, and counts them up to `count`."""
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(os.cpu_count()) as workers,
        Progress(what, count, "image", progress) as shown,
    ):
        # Filters belong to the process: without this one around all threads, a thread that restores its own would
        # let another's decompression bomb through. Its pattern keeps `decode`'s filter from replacing it.
        warnings.filterwarnings("error", message=".*", category=Image.DecompressionBombWarning)

        def spread(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
            results = list[Result]()
            for first in range(0, len(items), AT_ONCE):
                for result in workers.map(work, items[first : first + AT_ONCE]):
                    results.append(result)
                    shown.advance()
            return results

        try:
            yield spread
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)  # or all that is left would be done first
            raise


def in_parallel(what: str, work: Callable[[int], Result], count: int, progress: bool) -> list[Result]:
    """Return work(0) .. work(count - 1)."""
    with all_cores(what, count, progress) as spread:
        return spread(work, range(count))
