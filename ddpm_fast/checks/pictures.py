"""Does what is sampled become the pixels that somebody looks at: in range, rounded, each channel in its place?"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.runs import grids

FILE = "ddpm_fast/runs/grids.py"


def check_pictures(channels: int) -> Iterator[CheckResult]:
    """Check each way from values in -1..1 to pixels in a file, for images of that many channels."""
    x, pixels = values_and_pixels(channels)
    made, name = grids.to_uint8(x[None])[0], "-1..1 becomes 0..255"
    yield _same_pixels(name, made, pixels)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "000000.png"
        grids.save_image(file, pixels)
        yield _same_pixels("a PNG holds its image", _read(file), pixels)
        expected = grids.grid(np.stack([pixels, 255 - pixels]))
        normalized, raw = grids.save_normalized_and_raw(torch.stack([x, -x]), Path(directory), "grid")
        yield _same_pixels("a preview shows its images", _uncaptioned(normalized, expected), bands_of(expected))
        stretched = grids.grid((torch.stack([x, -x]) / 1.7 * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        shown, right = _uncaptioned(raw, stretched), bands_of(stretched)
        close = shown.shape == right.shape and np.abs(shown.astype(int) - right).max() <= 1  # halves round either way
        yield _same_pixels("a raw preview is stretched", right if close else shown, right)
    listed = grids.Images(np.stack([pixels, 255 - pixels]))
    yield _same_pixels("a list of images holds its images", bands_of(listed[0]), pixels)
    yield _same_pixels("a list of images is shown as a grid", bands_of(listed.grid()), bands_of(expected))
    factor = expected.height // (pixels.shape[0] + 2 * grids.GAP)
    first = bands_of(expected)[grids.GAP * factor :: factor, grids.GAP * factor :: factor]
    yield _same_pixels("a grid begins with its first image", first[: pixels.shape[0], : pixels.shape[1]], pixels)


def values_and_pixels(channels: int) -> tuple[Tensor, NDArray[np.uint8]]:
    """Return values [C, 9, 32] up to 0.4 of a pixel off their pixels [9, 32, C], and beyond the range in the last row.

    Every pixel value occurs, and each channel has others.
    """
    pixel = (torch.arange(256)[None] * 7 + 50 * torch.arange(channels)[:, None]) % 256
    off = 0.4 * torch.tensor([1.0, -1.0]).repeat(128)
    x = (pixel + off) / 127.5 - 1
    outside = torch.tensor([-1.7, 1.7]).repeat(16).expand(channels, -1)
    pixel = torch.cat([pixel, outside.sign() * 127.5 + 127.5], dim=1).view(channels, 9, 32)
    x = torch.cat([x, outside], dim=1).view(channels, 9, 32)
    return x, pixel.permute(1, 2, 0).numpy().astype(np.uint8)


def bands_of(image: Image.Image) -> NDArray[np.uint8]:
    """Return a picture's bands in the order red, green, blue (or grey), alpha: [H, W, C]."""
    order = [band for band in "LRGBA" if band in image.getbands()]
    return np.stack([np.asarray(image.getchannel(band)) for band in order], axis=-1)


def _uncaptioned(file: Path, like: Image.Image) -> NDArray[np.uint8]:
    """Read a preview without the caption below it and the margins beside it."""
    with Image.open(file) as image:
        left = (image.width - like.width) // 2
        return bands_of(image.crop((left, 0, left + like.width, like.height)).convert(like.mode))


def _read(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        return bands_of(image)


def _same_pixels(name: str, found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> CheckResult:
    if found.shape != expected.shape:
        text = f"{found.shape}, not {expected.shape}"
    elif np.array_equal(found, expected):
        text = ""
    elif np.array_equal(found[..., ::-1], expected):
        text = "the channels in reverse order"
    else:
        off = np.abs(found.astype(int) - expected)
        text = f"{np.mean(off > 0):.0%} of the values otherwise, up to {off.max()}; {found.min()}..{found.max()}"
    place = "every value and channel in its place"
    return CheckResult("pixels", name, judged(not text), place, text or "just that", FILE)
