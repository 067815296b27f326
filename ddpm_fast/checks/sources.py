"""Do the pixels that training reads stand in the files that --data names? A few images are read here another way.

The rule (see `data.dataset`): upright, converted to the channel count, transparency over white, resized until the image
just covers H x W, the centre cut out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ddpm_fast import data
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.config import Config
from ddpm_fast.data.dataset import Dataset

LOOKED_AT = {False: 3, True: 24}
"""Images that are read again, in the quick part and in full."""
MOST_OFF = 2.0
"""Mean difference of pixels, in 0..255, that another decoder or rounding makes."""
BANDS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
PLAIN_MODES = ("L", "LA", "RGB", "RGBA", "1", "CMYK", "YCbCr")
"""Of Pillow: those whose conversion needs no rule of its own, as palettes do."""
FILE = "ddpm_fast/data/image_files.py or ddpm_fast/data/pictures.py"

Source = Callable[[int], NDArray[np.uint8] | None]
"""What the i-th image should be, [H, W, C], or None where this file does not know."""


def check_sources(config: Config, dataset: Dataset, full: bool = False) -> Iterator[CheckResult]:
    """Check how many images there are, and the pixels of some."""
    shape = (config.unet.height, config.unet.width, config.unet.image_channels)
    images = dataset.images
    right, found = images.shape[1:] == shape and images.dtype == np.uint8, f"{images.shape[1:]} {images.dtype}"
    yield CheckResult("data", "images fit the U-Net", judged(right), f"{shape} uint8", found, FILE)
    opened = _open(config, dataset, shape) if right else None
    if opened is None:
        return
    count, source = opened
    name, expected = "every usable image of the data is there", f"{count} images"
    yield CheckResult("data", name, judged(len(dataset) == count), expected, f"{len(dataset)}", FILE)
    rows = np.unique(np.linspace(0, len(images) - 1, LOOKED_AT[full]).round().astype(int))
    pairs = [(row, wanted) for row in rows if (wanted := source(int(row))) is not None]
    off = [float(np.abs(images[row].astype(float) - wanted).mean()) for row, wanted in pairs]
    wrong = [f"image {row} is {o:.0f} off" for (row, _), o in zip(pairs, off, strict=True) if o > MOST_OFF]
    name, expected = "pixels are those of the files", f"{len(pairs)} images within {MOST_OFF:.0f} of 255"
    found = wrong[0] if wrong else f"{max(off, default=0):.1f} off at most"
    yield CheckResult("data", name, judged(not wrong), expected, found, FILE)


def _open(config: Config, dataset: Dataset, shape: tuple[int, int, int]) -> tuple[int, Source] | None:
    """Return how many images a source holds and how to read one, or None for a source of another kind."""
    path = Path(dataset.source)
    if dataset.source == "digits":
        return _digits(shape)
    if dataset.source and path.is_dir() and (files := _pictures(path)):
        return _folder(path, files, dataset, shape)
    if path.suffix in (".npy", ".npz") and path.is_file():
        return _array(path, shape, config.data.float_range)
    return None


def _expected(image: Image.Image, shape: tuple[int, int, int]) -> NDArray[np.uint8] | None:
    """Apply the rule to a picture."""
    height, width, channels = shape
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode not in PLAIN_MODES or "transparency" in image.info:
        return None
    if image.mode in ("LA", "RGBA") and channels in (1, 3):
        over_white = Image.new("RGB", image.size, "white")
        over_white.paste(image.convert("RGB"), mask=image.getchannel("A"))
        image = over_white
    image = image.convert(BANDS[channels])
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (left, top, image.width - left, image.height - top)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box)).reshape(shape)


def _digits(shape: tuple[int, int, int]) -> tuple[int, Source]:
    with np.load(Path(data.__path__[0]) / "digits.npz", allow_pickle=False) as arrays:
        pixels = (arrays["images"] * 15.9375).round().astype(np.uint8)  # of 0..16
    return len(pixels), lambda row: _expected(Image.fromarray(pixels[row]), shape)


def _array(path: Path, shape: tuple[int, int, int], float_range: str) -> tuple[int, Source]:
    loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    array = (
        loaded
        if isinstance(loaded, np.ndarray)
        else loaded[next(n for n in loaded.files if n not in ("labels", "classes"))]
    )

    def pixels(row: int) -> NDArray[np.uint8] | None:
        image = np.asarray(array[row])
        if float_range == "0..1":
            image = (image.astype(float) * 255).round().astype(np.uint8)
        elif float_range == "-1..1":
            image = (image.astype(float) * 127.5 + 127.5).round().astype(np.uint8)
        return _expected(Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), shape)

    return len(array), pixels


def _pictures(path: Path) -> list[Path]:
    endings = Image.registered_extensions()
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
    return [f for f in files if not any(p[0] == "." or p == "__MACOSX" for p in f.relative_to(path).parts)]


def _folder(path: Path, files: list[Path], dataset: Dataset, shape: tuple[int, int, int]) -> tuple[int, Source]:
    reasons = dataset.skipped  # each begins with the file's name
    usable = [f for f in files if not any(reason.startswith(f"{f.relative_to(path)} (") for reason in reasons)]

    def pixels(row: int) -> NDArray[np.uint8] | None:
        if len(usable) + len(dataset.skipped) != len(files):  # a name that cannot be printed
            return None
        with Image.open(usable[row]) as image:
            image.load()
            return _expected(image, shape)

    return len(files) - len(dataset.skipped), pixels
