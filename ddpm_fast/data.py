"""Images in: a folder, an array or the built-in digits become one uint8 store, decoded once, memory-mapped after.

The rule, the same for every source: turn upright (EXIF); convert to the channel count (1 grey, 2 grey and alpha,
3 RGB, 4 RGBA; for 1 and 3 what is transparent is laid over white); resize, keeping the aspect, until the image just
covers H x W (Lanczos, with antialiasing); cut out the centre.
Shapes: M images in the store, N in a batch, C channels, H x W pixels.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddpm_fast.arrays import read_array
from ddpm_fast.config import DataConfig, InputError, UNetConfig, nearest
from ddpm_fast.noise import permutation
from ddpm_fast.pictures import Unusable, decode, fit, is_picture

STORE_VERSION = 1
"""Part of the cache's key: raise it when the rule above changes."""
NAMED = 5
"""How many unusable files an error names one by one."""
DEVICE_SHARE = 4
"""The store moves to the GPU if it takes at most one part in this many of its free memory."""


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
    if not data.data:
        raise InputError("this preset has no data of its own: name --data, a folder of images or a .npy/.npz file")
    if data.data == "digits":
        return _in_memory(_digits(), shape, data.data)
    path = Path(data.data)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"--data {path} does not exist.{nearest(path.name, [*siblings, 'digits'])}")
    if path.is_dir():
        return _open_folder(path, shape, data, progress)
    if path.suffix not in (".npy", ".npz"):
        raise InputError(f"--data {path} is a file, but neither .npy nor .npz: name one of those or a folder of images")
    return _open_array(path, shape, data)


def _digits() -> NDArray[np.uint8]:
    """Return scikit-learn's 1,797 handwritten digits, their 17 grey levels spread over 0..255: [M, 8, 8, 1]."""
    from sklearn.datasets import load_digits  # half a second to import

    pixels, _ = load_digits(return_X_y=True)
    return np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _in_memory(images: NDArray[np.uint8], shape: tuple[int, int, int], source: str) -> Dataset:
    if images.shape[1:] != shape:
        images = np.stack([fit(image, shape) for image in images])
    return Dataset(images, _digest(repr((shape, STORE_VERSION)).encode(), images.tobytes()), source)


def cache_directory() -> Path:
    """Return where decoded stores live: $XDG_CACHE_HOME/ddpm-fast, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-fast"


def _cached(key: str, count: int, shape: tuple[int, int, int]) -> NDArray[np.uint8] | None:
    """Map a store of the cache; None when it is missing, torn or not of this shape."""
    try:
        images = np.load(cache_directory() / f"{key}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return images if images.shape == (count, *shape) and images.dtype == np.uint8 else None


def _build(key: str, count: int, shape: tuple[int, int, int], fill: Callable[[NDArray[np.uint8]], None]) -> None:
    """Write a store into the cache, whole or not at all."""
    path = cache_directory() / f"{key}.npy"
    temporary = path.with_name(f".{key}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:  # a full disk shows here, and not as SIGBUS in a mapped page
            os.posix_fallocate(file.fileno(), 0, 128 + count * int(np.prod(shape)))
        store = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(count, *shape))
        fill(store)
        store.flush()
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {path}: {reason}; free some space or set XDG_CACHE_HOME elsewhere") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _open_array(path: Path, shape: tuple[int, int, int], data: DataConfig) -> Dataset:
    images = read_array(path, data.float_range)
    if images.shape[1:] == shape and path.suffix == ".npy" and images.flags.c_contiguous:
        key = _digest(repr((shape, STORE_VERSION)).encode(), images.tobytes())
        return Dataset(images, key, data.data)
    key = _digest(repr((images.shape, shape, STORE_VERSION)).encode(), images.tobytes())
    if _cached(key, len(images), shape) is None:

        def fill(store: NDArray[np.uint8]) -> None:
            for i, image in enumerate(images):
                store[i] = fit(image, shape)

        _build(key, len(images), shape, fill)
    return _opened(key, len(images), shape, data.data, ())


def _opened(key: str, count: int, shape: tuple[int, int, int], source: str, skipped: tuple[str, ...]) -> Dataset:
    images = _cached(key, count, shape)
    if images is None:
        raise InputError(f"{cache_directory() / key}.npy cannot be read back: remove it and try again")
    return Dataset(images, key, source, skipped)


def _open_folder(path: Path, shape: tuple[int, int, int], data: DataConfig, progress: bool) -> Dataset:
    files = sorted(file for file in path.rglob("*") if is_picture(file) and file.is_file())
    if not files:
        raise InputError(f"--data {path} holds no image: name a folder with PNG, JPEG, WebP or other image files")
    workers = ThreadPoolExecutor(os.cpu_count())
    with workers, tqdm(total=len(files), unit="file", desc="reading", disable=not progress) as bar:

        def content(file: Path) -> bytes:
            bar.update()
            try:
                return hashlib.blake2b(file.read_bytes()).digest()
            except OSError:
                return b"unreadable"

        digests = list(workers.map(content, files))
    names = [os.fsencode(file.relative_to(path)) for file in files]
    key = _digest(repr((shape, STORE_VERSION)).encode(), *names, *digests)
    # The list of unusable files is part of what was found out by decoding; it is kept beside the store.
    skipped_file = cache_directory() / f"{key}.skipped"
    try:
        skipped = tuple(skipped_file.read_text().splitlines())
    except OSError:
        skipped = None
    if skipped is None or _cached(key, len(files) - len(skipped), shape) is None:
        skipped = _decode_all(path, files, key, shape, progress)
    if (skipped and not data.skip_bad) or len(skipped) == len(files):
        _refuse(path, skipped, len(files))
    return _opened(key, len(files) - len(skipped), shape, data.data, skipped)


def _refuse(path: Path, skipped: tuple[str, ...], total: int) -> None:
    more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    remedy = "none is left" if len(skipped) == total else "repair or remove them, or leave them out with --skip-bad"
    raise InputError(
        f"--data {path}: {len(skipped)} of {total} images cannot be used: {'; '.join(skipped[:NAMED])}{more}; {remedy}"
    )


def _decode_all(
    path: Path, files: list[Path], key: str, shape: tuple[int, int, int], progress: bool
) -> tuple[str, ...]:
    """Scan every file, then decode the usable ones into the cache; return the unusable ones with their reasons."""
    with ThreadPoolExecutor(os.cpu_count()) as workers:

        def scan(file: Path) -> str:
            try:
                decode(file)
            except Unusable as reason:
                return f"{file.relative_to(path)} ({reason})".replace("\n", " ")
            return ""

        scanned = tqdm(workers.map(scan, files), total=len(files), unit="file", desc="scanning", disable=not progress)
        reasons = list(scanned)
        usable = [file for file, reason in zip(files, reasons, strict=True) if not reason]

        def fill(store: NDArray[np.uint8]) -> None:
            def put(i: int) -> None:
                store[i] = fit(decode(usable[i]), shape)

            numbers = range(len(usable))
            for _ in tqdm(workers.map(put, numbers), total=len(usable), unit="image", disable=not progress):
                pass

        skipped = tuple(reason for reason in reasons if reason)
        if usable:
            _build(key, len(usable), shape, fill)
            (cache_directory() / f"{key}.skipped").write_text("".join(f"{line}\n" for line in skipped))
    return skipped


class ExampleOrder:
    """Which image each training example is: every epoch visits all images once, in an order of its own."""

    def __init__(self, key: Tensor, count: int) -> None:
        """Take the seed's key [2] and the number of images M."""
        self.key, self.count = key, count
        self._orders: dict[int, Tensor] = {}

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = permutation(self.key, epoch, self.count)
        return self._orders[epoch]

    def indices(self, first_example: int, n: int) -> Tensor:
        """Return the images of examples first_example .. first_example + n - 1: [n] int64 in 0..M-1.

        A batch may straddle epochs; each example still belongs to its own.
        """
        parts, example, end = [], first_example, first_example + n
        while example < end:
            epoch, position = divmod(example, self.count)
            stop = min(self.count, position + end - example)
            parts.append(self._order(epoch)[position:stop])
            example += stop - position
        return torch.cat(parts)


class BatchSource:
    """Training batches on the device: the store moves there where it fits, else batches are copied."""

    def __init__(self, dataset: Dataset, key: Tensor, device: torch.device) -> None:
        """Take the data set, the seed's key [2] and where batches are wanted."""
        self.device = device
        self.store = _as_tensor(dataset.images)
        if device.type == "cuda" and self.store.nbytes * DEVICE_SHARE <= torch.cuda.mem_get_info(device)[0]:
            self.store = self.store.to(device)
        self.order = ExampleOrder(key.to(self.store.device), len(dataset))

    def batch(self, first_example: int, n: int) -> tuple[Tensor, Tensor]:
        """Return images [n, C, H, W] uint8, laid out as NHWC, and the examples' numbers [n] int64."""
        rows = self.store[self.order.indices(first_example, n)].to(self.device)
        numbers = torch.arange(first_example, first_example + n, device=self.device)
        return rows.permute(0, 3, 1, 2), numbers


def _as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Share a read-only array with PyTorch, which is never going to write to it, without copying."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(images)
