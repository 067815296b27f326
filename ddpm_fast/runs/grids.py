"""Samples as pictures: single images, grids, captions, animations.

Shapes: N images, H x W pixels, C channels; pixels are uint8 [N, H, W, C].
"""

import io
from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm_fast.files import whole

Pixels = NDArray[np.uint8]
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
GAP = 2
"""Pixels between the images of a grid, before it is enlarged."""
CELL, LARGEST_GRID = 64, 2048
"""A grid is enlarged until its images are CELL pixels high, but not beyond LARGEST_GRID pixels."""


def _scale(samples: Tensor, low: float, high: float) -> Pixels:
    """Map [low, high] of samples [N, C, H, W] to 0..255; values that are not finite become 0."""
    values = samples.detach().float().cpu().nan_to_num(nan=low, posinf=low, neginf=low)
    scaled = ((values - low) * (255 / max(high - low, 1e-12))).round().clamp(0, 255)
    return np.ascontiguousarray(rearrange(scaled.numpy(), "n c h w -> n h w c").astype(np.uint8))


def to_uint8(samples: Tensor) -> Pixels:
    """Map the data range [-1, 1] of samples [N, C, H, W] to pixels 0..255, clipping what lies outside."""
    return _scale(samples, -1.0, 1.0)


def to_image(pixels: Pixels) -> Image.Image:
    """Return pixels [H, W, C] as a Pillow image of mode L, LA, RGB or RGBA."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, MODES[pixels.shape[-1]])


def save_picture(path: Path, image: Image.Image, **options: object) -> None:
    """Write a picture whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with whole(path, sync=False) as temporary:  # a picture can be made again
        image.save(temporary, **options)  # pyright: ignore[reportArgumentType]


def save_image(path: Path, pixels: Pixels) -> None:
    """Write pixels [H, W, C] as a PNG of exactly that size."""
    save_picture(path, to_image(pixels))


def grid(pixels: Pixels, columns: int | None = None) -> Image.Image:
    """Lay out pixels [N, H, W, C] row by row, near square, enlarged by an integer factor until all is visible.

    Raises:
        ValueError: there are no images.
    """
    count, height, width, channels = pixels.shape
    if not count:
        raise ValueError("a grid of no images")
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 255, dtype=np.uint8)
    for number, image in enumerate(pixels):
        top = GAP + number // columns * (height + GAP)
        left = GAP + number % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    factor = max(1, min(-(-CELL // height), LARGEST_GRID // max(canvas.shape[:2])))
    laid_out = to_image(canvas)
    return laid_out.resize((laid_out.width * factor, laid_out.height * factor), Image.Resampling.NEAREST)


def captioned(image: Image.Image, text: str) -> Image.Image:
    """Write a line of text under a picture, widening the canvas where the text is longer."""
    font = ImageFont.load_default(size=14)
    left, top, right, bottom = font.getbbox(text)
    margin = 6
    width = max(image.width, int(right - left) + 2 * margin)
    mode = "RGBA" if image.mode in ("LA", "RGBA") else "RGB"
    canvas = Image.new(mode, (width, image.height + int(bottom - top) + 2 * margin), "white")
    canvas.paste(image.convert(mode), ((width - image.width) // 2, 0))
    ImageDraw.Draw(canvas).text((margin - left, image.height + margin - top), text, fill="black", font=font)
    return canvas


def save_normalized_and_raw(samples: Tensor, directory: Path, stem: str) -> tuple[Path, Path]:
    """Write a grid twice: by the data range, and stretched from the samples' own minimum to their maximum.

    A drift out of range, which clipping hides, shows in the difference and in the captions.
    """
    finite = samples[samples.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    broken = samples.numel() - finite.numel()
    note = f"; {broken} values are not finite, shown black" if broken else ""
    normalized, raw = directory / f"{stem}_normalized.png", directory / f"{stem}_raw.png"
    caption = f"normalized: [-1, 1] to black..white; samples span [{low:.3f}, {high:.3f}]{note}"
    save_picture(normalized, captioned(grid(to_uint8(samples)), caption))
    save_picture(
        raw, captioned(grid(_scale(samples, low, high)), f"raw: [{low:.3f}, {high:.3f}] to black..white{note}")
    )
    return normalized, raw


def cut_back(run: Path, step: int) -> None:
    """Remove a run's grids of later steps than the one from which it starts again."""
    for picture in (run / "samples").glob("step-*_*.png"):
        if int(picture.name.removeprefix("step-").split("_")[0]) > step:
            picture.unlink()


def save_animation(path: Path, frames: list[Pixels], milliseconds: int = 60) -> None:
    """Write a GIF of grids, one frame each [N, H, W, C]; the last stays for two seconds."""
    pictures = [grid(frame).convert("RGB") for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    save_picture(path, pictures[0], save_all=True, append_images=pictures[1:], duration=durations, loop=0)


class Images(list[Image.Image]):
    """Sampled images as a list, which a notebook shows as one grid."""

    def __init__(self, pixels: Pixels) -> None:
        """Take pixels [N, H, W, C]; each becomes a Pillow image of mode L, LA, RGB or RGBA."""
        super().__init__(to_image(image) for image in pixels)

    def grid(self, columns: int | None = None) -> Image.Image:
        """Lay out the images that the list holds now, row by row, enlarged until small images are visible.

        Raises:
            ValueError: there are none.
        """
        pixels = [np.asarray(image).reshape(image.height, image.width, -1) for image in self]
        return grid(np.stack(pixels) if pixels else np.zeros((0, 1, 1, 1), np.uint8), columns)

    def _repr_png_(self) -> bytes | None:
        if not self:
            return None
        png = io.BytesIO()
        self.grid().save(png, "png")
        return png.getvalue()
