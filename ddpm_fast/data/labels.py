"""Which class each image is of, where the data set says so, and what the classes are called."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Labels:
    """The classes of M images; without any where the data set has none."""

    values: NDArray[np.int64] | None = None
    """[M], any whole numbers."""
    classes: tuple[str, ...] = ()
    """Name of each class 0, 1, ...; empty where only numbers are known."""

    def of(self, rows: Sequence[int]) -> "Labels":
        """Return those of some images."""
        return self if self.values is None else Labels(self.values[np.asarray(rows, dtype=np.int64)], self.classes)


NO_LABELS = Labels()


def from_values(values: Sequence[int | str | bool | None], classes: Sequence[str] = ()) -> Labels:
    """Return labels from what a column or a file says of each image: none where one image or more has no class.

    Numbers stay as they are; other names become 0, 1, ... in their alphabetical order, and so do false and true.

    Args:
        values: one per image; None, and -1 where the classes have names, is an image without a class.
        classes: the names of the classes that numbers mean.
    """
    if not values or any(value is None or (classes and value == -1) for value in values):
        return NO_LABELS
    texts = [str(value) for value in values]
    if not any(isinstance(value, bool) for value in values) and all(_is_whole(text) for text in texts):
        return Labels(np.array([int(text) for text in texts], dtype=np.int64), tuple(classes))
    return _numbered(texts)


def _is_whole(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 19


def from_folders(paths: Sequence[Path]) -> Labels:
    """Return labels from the folders that lie directly under the data set's: none unless each image is in one of many.

    Args:
        paths: of the images, relative to the data set's folder.
    """
    folders = [path.parts[0] for path in paths if len(path.parts) > 1]
    return _numbered(folders) if len(folders) == len(paths) and len(set(folders)) > 1 else NO_LABELS


def _numbered(names: Sequence[str]) -> Labels:
    """Number names in their alphabetical order."""
    classes = sorted(set(names))
    numbers = {name: number for number, name in enumerate(classes)}
    return Labels(np.array([numbers[name] for name in names], dtype=np.int64), tuple(classes))
