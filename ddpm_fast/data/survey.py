"""What a data set is like, before it is decoded: how many images, of which sizes, in colour, transparent.

Shapes: M images, C channels, H x W pixels.
"""

import io
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_fast.config import DataConfig
from ddpm_fast.data.arrays import ArrayImages, read_array
from ddpm_fast.data.dataset import pictures_of
from ddpm_fast.data.digits import read_digits
from ddpm_fast.data.image_files import MODES, TRANSPARENT, formats, to_mode
from ddpm_fast.data.pictures import Contents, Encoded
from ddpm_fast.progress import Progress

SIZED = 2000
"""Pictures, spread evenly over a folder, whose size is read where not all are asked for."""
DECODED = 64
"""Images, spread evenly, of which colour and transparency are seen."""
THUMBNAIL = 64
"""Pixels, or a little more, that suffice for it: JPEG files are decoded to no more."""
GREY_LEVELS = 8
"""That red, green and blue of a grey image may lie apart: JPEG's colours are rounded."""
TURNED = (5, 6, 7, 8)
"""EXIF's orientations of an image that lies on its side."""
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Facts:
    """What a data set is like."""

    count: int
    """Of images, or files that are called like images."""
    heights: tuple[int, int, int]
    """The least, the median and the greatest, in pixels."""
    widths: tuple[int, int, int]
    """The least, the median and the greatest, in pixels."""
    side: int
    """Median of the images' smaller sides, in pixels."""
    grey: bool
    """No image that was looked at has a colour."""
    transparent: bool = False
    """An image that was looked at shows what is behind it."""
    modes: tuple[tuple[str, int], ...] = ()
    """Pillow's names of what files hold, as RGB or P, and how many do; of an array there is one."""

    def __str__(self) -> str:
        """Say it in words."""
        (least_h, height, most_h), (least_w, width, most_w) = self.heights, self.widths
        one_size = (least_h, least_w) == (most_h, most_w)
        size = f"{width}x{height}" + ("" if one_size else " at the median")
        kind = ("grey" if self.grey else "in colour") + (", some transparent" if self.transparent else "")
        images = f"{self.count:,} image{'s' * (self.count != 1)}"
        return f"{images}, {size}, {kind}"


def survey(data: DataConfig, all_sizes: bool = False, progress: bool = False) -> Facts:
    """Look at --data without decoding all of it.

    Args:
        data: what to look at.
        all_sizes: read every file's size, and not only those of some.
        progress: show a bar.

    Raises:
        InputError: the source is missing or empty, or an array that cannot be used.
    """
    if data.data == "digits":
        return _of_array(read_digits()[0])
    source, _ = pictures_of(data, progress)
    if source is None:
        return _of_array(read_array(Path(data.data), data.float_range))
    contents = source.look()
    headers = _headers(contents, contents.count if all_sizes else SIZED, progress)
    grey, transparent = _look(map(_thumbnail, _some(contents, DECODED)))
    heights, widths, modes = zip(*headers or [(0, 0, "")], strict=True)  # whoever decodes them says what is wrong
    side = round(statistics.median(map(min, heights, widths)))
    counted = tuple(Counter(modes).most_common())
    return Facts(contents.count, _range(heights), _range(widths), side, grey, transparent, counted)


def spread(items: Sequence[Any], most: int) -> Sequence[Any]:
    """Return at most so many items, evenly spread from the first on."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else items


def _range(values: Sequence[int]) -> tuple[int, int, int]:
    return min(values), round(statistics.median(values)), max(values)


def _of_array(images: NDArray[np.uint8] | ArrayImages) -> Facts:
    count, height, width, channels = images.shape
    some = (images[i] for i in spread(range(count), DECODED))
    grey, transparent = _look(Image.fromarray(x if channels > 1 else x[..., 0], MODES[channels]) for x in some)
    sizes = (height, height, height), (width, width, width)
    return Facts(count, *sizes, min(height, width), grey, transparent, ((MODES[channels], count),))


def _some(contents: Contents, most: int) -> Iterator[Encoded]:
    """Yield at most so many pictures: spread over a folder's, and the first where a file holds many."""
    for block in contents.blocks():
        chosen = spread(block, most)
        yield from chosen
        most -= len(chosen)
        if most <= 0:
            return


def _headers(contents: Contents, most: int, progress: bool) -> list[tuple[int, int, str]]:
    """Return the height, width and mode of each picture that has a header, upright."""
    found = list[tuple[int, int, str]]()
    with Progress("looking", min(most, contents.count), "image", progress) as shown:
        for encoded in _some(contents, most):
            header = _opened(encoded, lambda image: (*_upright(image), image.mode))
            found += [header] if header else []
            shown.advance()
    return found


def _opened(encoded: Encoded, look: Callable[[Image.Image], Any]) -> Any:
    """Return what is seen in a picture; None where it cannot be opened."""
    if encoded is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
            with Image.open(file, formats=formats()) as image:
                return look(image)
        except Exception:  # on damaged files Pillow's decoders raise whatever they stumble over
            return None


def _upright(image: Image.Image) -> tuple[int, int]:
    turned = image.format in ("JPEG", "MPO") and image.getexif().get(EXIF_ORIENTATION) in TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def _thumbnail(encoded: Encoded) -> Image.Image | None:
    def small(image: Image.Image) -> Image.Image:
        image.draft(None, (THUMBNAIL, THUMBNAIL))
        image.load()
        return image.copy()

    return _opened(encoded, small)


def _look(images: Iterable[Image.Image | None]) -> tuple[bool, bool]:
    """Return whether all images are grey, and whether any is transparent."""
    grey, transparent = True, False
    for image in images:
        if image is None:
            continue
        if grey and image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;"):
            pixels = np.asarray(to_mode(image, "RGB"), dtype=np.int16)
            grey = int(np.ptp(pixels, axis=-1).max(initial=0)) <= GREY_LEVELS
        if not transparent and ("transparency" in image.info or image.mode in TRANSPARENT):
            transparent = int(np.asarray(image.convert("RGBA"))[..., 3].min(initial=255)) < 255
        if not grey and transparent:
            break
    return grey, transparent
