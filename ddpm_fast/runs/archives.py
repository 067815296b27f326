"""Many images as one file: an .npz, or a .tar as WebDataset reads it; in memory that does not grow with their number.

While images are made, each batch is kept as a file of its own in parts/. Once all are there they are packed, one batch
after the other, and the parts removed. The archive appears whole or not at all.
Shapes: N images, H x W pixels, C channels; pixels are uint8 [N, H, W, C].
"""

import contextlib
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ddpm_fast.files import whole
from ddpm_fast.progress import Progress
from ddpm_fast.runs.grids import Pixels, to_image

ARRAY = "arr_0"
"""The array's name in an .npz: what ADM's evaluator and its kin read."""


class Parts:
    """Finished batches in a directory, each a file NUMBER-NUMBER.npy of its first and last image."""

    def __init__(self, directory: Path) -> None:
        """Name the directory, which is made with the first part."""
        self.directory = directory

    def add(self, first: int, pixels: Pixels) -> None:
        """Keep a batch, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        path = self.directory / f"{first:06d}-{first + len(pixels) - 1:06d}.npy"
        with whole(path, sync=False) as temporary:
            np.save(temporary, pixels)

    def _each(self) -> Iterator[tuple[int, Pixels]]:
        """Yield the first number and the pixels of each part that is whole, in order."""
        files = sorted(self.directory.glob("*-*.npy"), key=lambda file: (len(file.stem), file.stem))
        for file in files:
            with contextlib.suppress(ValueError, OSError, EOFError):  # torn, by a machine that lost its power
                first, last = map(int, file.stem.split("-"))
                pixels = np.load(file, mmap_mode="r", allow_pickle=False)
                if len(pixels) == last - first + 1:
                    yield first, pixels

    def numbers(self) -> set[int]:
        """Return the numbers of the images that are there."""
        return {first + i for first, pixels in self._each() for i in range(len(pixels))}

    def batches(self, first: int, count: int) -> Iterator[Pixels]:
        """Yield images first .. first + count - 1 in order, each once, though parts of other batch sizes overlap."""
        number, end = first, first + count
        for start, pixels in self._each():
            chosen = pixels[max(number - start, 0) : max(end - start, 0)] if start <= number else pixels[:0]
            if len(chosen):
                yield chosen
                number += len(chosen)

    def remove(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.directory, ignore_errors=True)


def pack(path: Path, parts: Parts, first: int, count: int, progress: bool | None) -> None:
    """Write images first .. first + count - 1 as one file, whole or not at all.

    Args:
        path: of the archive; its suffix says which kind.
        parts: which hold all of them.
        first: number of the first image.
        count: how many.
        progress: show a bar, or say a line now and then; None for neither.

    Raises:
        InputError: it cannot be written.
    """
    write = _write_npz if path.suffix == ".npz" else _write_tar
    with Progress("packing", count, "image", progress, leave=False) as shown, whole(path) as temporary:
        write(temporary, parts.batches(first, count), first, count, shown.advance)


Advance = Callable[[int], None]


def _write_npz(path: Path, batches: Iterator[Pixels], first: int, count: int, advance: Advance) -> None:
    member = zipfile.ZipInfo(f"{ARRAY}.npy")  # of 1980: equal images are equal bytes
    with zipfile.ZipFile(path, "w") as archive, archive.open(member, "w", force_zip64=True) as file:
        for number, pixels in enumerate(batches):
            if number == 0:
                shape = (count, *pixels.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)  # pyright: ignore[reportArgumentType]
            file.write(pixels.tobytes())
            advance(len(pixels))


def _write_tar(path: Path, batches: Iterator[Pixels], first: int, count: int, advance: Advance) -> None:
    number = first
    with tarfile.open(path, "w") as archive:
        for pixels in batches:
            for image in pixels:
                png = io.BytesIO()
                to_image(image).save(png, "png")
                member = tarfile.TarInfo(f"{number:06d}.png")  # of 1970, and nobody's: equal images are equal bytes
                member.size = png.tell()
                png.seek(0)
                archive.addfile(member, png)
                number += 1
            advance(len(pixels))
