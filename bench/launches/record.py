"""What the stand-in writes down: each launch, copy, wait and refusal, in order, and the bytes that calls move."""

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor


class Entry(NamedTuple):
    """A line of the record."""

    event: str
    """launch, copy, fill, wait, refused, begin or end (of a capture), replay; from Python: call, moved, phase."""
    values: tuple[str, ...]


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["STANDIN_FOLDER"] + "/libcuda.so.1")


def note(event: str, *values: object) -> None:
    """Write a line of our own into the record."""
    _library().standin_note("\t".join([event, *map(str, values)]).encode())


def size(values: Iterable[Any]) -> int:
    """Return the bytes of all tensors among values and in lists of them."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, list | tuple):
            total += size(value)
    return total


@contextmanager
def recorded() -> Iterator[list[Entry]]:
    """Record what happens inside; the list is filled on leaving."""
    path, entries = Path(os.environ["STANDIN_FOLDER"]) / "record.tsv", list[Entry]()
    _library().standin_record_to(str(path).encode())
    try:
        yield entries
    finally:
        _library().standin_record_to(b"")
    for line in path.read_text().splitlines():
        event, *values = line.split("\t")
        entries.append(Entry(event, tuple(values)))


def captures(entries: list[Entry]) -> list[list[Entry]]:
    """Return what each capture recorded, in order."""
    found: list[list[Entry]] = []
    inside = False
    for entry in entries:
        if entry.event == "begin":
            found.append([])
        elif inside and entry.event != "end":
            found[-1].append(entry)
        inside = entry.event == "begin" or (inside and entry.event != "end")
    return found
