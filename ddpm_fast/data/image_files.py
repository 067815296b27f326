"""One image file to pixels: decoding, and the rule that makes any image fit the U-Net (see `data`)."""

import contextlib
import io
import warnings
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
"""Modes with an alpha; a palette or grey may have one transparent value beside."""
PROGRAMS = ("EPS",)
"""Formats that are programs, which Pillow has Ghostscript run: they are not read."""


class Unusable(Exception):  # noqa: N818 - it is a finding, not an error
    """An image file cannot be used; the message says why."""


def is_picture(path: PurePath) -> bool:
    """Whether a file's name says that it is an image, by the extensions that Pillow can read."""
    Image.init()
    return Image.EXTENSION.get(path.suffix.lower(), PROGRAMS[0]) not in PROGRAMS


def formats() -> list[str]:
    """Return which formats are read."""
    Image.init()
    return [name for name in Image.OPEN if name not in PROGRAMS]


def is_encoded(content: bytes) -> bool:
    """Whether a file's content begins as an image does."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.open(io.BytesIO(content), formats=formats()).close()
        return True
    return False


def decode(encoded: Path | bytes, shape: tuple[int, int, int]) -> Image.Image:
    """Read an image completely, turned upright; a JPEG at 1/2, 1/4 or 1/8 of its size if that is twice what it needs.

    A JPEG's blocks are then averaged instead of decoded, a photo of 12 megapixels in a fifth of the time, and `fit`
    still halves the picture at least: at 64 x 64 the pixels differ by 0.2 of 255 in the mean.

    Args:
        encoded: the file, or what it holds.
        shape: H, W and C of what it will become.

    Raises:
        Unusable: it is empty, truncated, not an image, unreadable, or large enough to be a decompression bomb.
    """
    try:
        if (len(encoded) if isinstance(encoded, bytes) else encoded.stat().st_size) == 0:
            raise Unusable("zero bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
            with Image.open(file, formats=formats()) as image:
                side = 2 * max(shape[:2])  # of both: it may still have to be turned
                image.draft(None, (side, side))
                image.load()
                return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unusable(f"over {Image.MAX_IMAGE_PIXELS} pixels, a decompression bomb") from None
    except UnidentifiedImageError:
        raise Unusable("not an image") from None
    except Unusable:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they stumble over
        raise Unusable(str(error) or type(error).__name__) from None


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to L, LA, RGB or RGBA; 16-bit grey keeps its high byte, transparency is composited over white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # I;16 and I hold 16-bit samples, F usually 0..255 or 0..1.
        full = 65535 if image.mode.startswith("I") else 1.0 if values.max(initial=0) <= 1 else 255.0
        image = Image.fromarray(np.rint(values.clip(0, full) * (255 / full)).astype(np.uint8))
    transparent = "transparency" in image.info or image.mode in TRANSPARENT
    if transparent and mode in ("L", "RGB"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.convert(mode)


def fit(image: Image.Image | NDArray[np.uint8], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Convert, resize and centre-crop an image, or pixels [h, w, c], to [H, W, C] uint8."""
    height, width, channels = shape
    if channels not in MODES:
        raise ValueError(f"images of {channels} channels: there must be 1 to 4")
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image, MODES[image.shape[-1]])
    image = to_mode(image, MODES[channels])
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels)
