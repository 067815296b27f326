"""Encoded pictures, from wherever they come, to a store: each is decoded once, and what was found out stays beside it.

KEY.npy    the images, the usable ones in front
KEY.json   how many pictures there were, which are left out and why, and the others' labels
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_fast.data.image_files import Unusable, decode, fit
from ddpm_fast.data.labels import NO_LABELS, Labels
from ddpm_fast.data.store import STORE_VERSION, Shape, all_cores, build, cached, digest, read_back
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files import cache_directory, replace_file

DECODER_VERSION = 2
"""Part of the key beside `STORE_VERSION`: raise it when `decode` gives other pixels. 2: JPEGs are read at a scale."""
NAMED = 5
"""How many unusable pictures an error names one by one."""

Encoded = Path | bytes | None
"""A picture as a file, or as what one holds; None where the source lacks it."""


@dataclass(frozen=True)
class Contents:
    """The pictures of a source, once it has been looked through."""

    count: int
    name: Callable[[int], str]
    """What to call the i-th picture."""
    blocks: Callable[[], Iterable[Sequence[Encoded]]]
    """Reads all pictures in order, so many at a time as may be in memory at once."""
    labels: Labels = NO_LABELS


@dataclass(frozen=True)
class Source:
    """What --data names, where it is made of encoded pictures."""

    name: str
    identity: tuple[bytes, ...]
    """What tells its content, in this order, from any other."""
    look: Callable[[], Contents]
    """Looks through it, which may take long: a store that is there already needs none of it."""


@dataclass(frozen=True)
class Decoded:
    """A store that is open."""

    images: NDArray[np.uint8]
    """[M, H, W, C], memory-mapped."""
    key: str
    skipped: tuple[str, ...] = ()
    """Pictures that were left out, with the reason."""
    labels: Labels = NO_LABELS


@dataclass(frozen=True)
class Findings:
    """What decoding found out."""

    count: int
    skipped: tuple[str, ...]
    labels: Labels


def open_pictures(source: Source, shape: Shape, skip_bad: bool, progress: bool) -> Decoded:
    """Map the store of a source, decoding it into the cache the first time.

    Raises:
        InputError: pictures cannot be used, and are not to be left out or none is left; nothing is then kept.
    """
    key = digest(repr((shape, STORE_VERSION, DECODER_VERSION)).encode(), *source.identity)
    found = _read_findings(key)
    if found is None or cached(key, found.count, shape) is None:
        found = _decode_all(source, key, shape, skip_bad, progress)
    _refuse_unusable(source.name, found.skipped, found.count, skip_bad)
    images = read_back(key, found.count, shape)
    return Decoded(images[: found.count - len(found.skipped)], key, found.skipped, found.labels)


def _refuse_unusable(name: str, skipped: Sequence[str], total: int, skip_bad: bool) -> None:
    if not skipped or (skip_bad and len(skipped) < total):
        return
    more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    remedy = "none is left" if len(skipped) == total else "repair or remove them, or leave them out with --skip-bad"
    raise InputError(
        f"--data {name}: {len(skipped)} of {total} images cannot be used: {'; '.join(skipped[:NAMED])}{more}; {remedy}"
    )


def _reason(encoded: Encoded, shape: Shape, row: NDArray[np.uint8]) -> str:
    """Decode a picture into a row [H, W, C] of the store; return "", or why it cannot be used."""
    try:
        if encoded is None:
            return "no bytes"
        row[:] = fit(decode(encoded, shape), shape)
    except Unusable as reason:
        return str(reason)
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they stumble over
        return f"{type(error).__name__}: {error}"
    return ""


def _decode_all(source: Source, key: str, shape: Shape, skip_bad: bool, progress: bool) -> Findings:
    """Decode every picture into the cache, usable ones in front. Refusing leaves nothing."""
    contents = source.look()
    skipped, usable = list[str](), list[int]()

    def fill(store: NDArray[np.uint8]) -> None:
        reasons = list[str]()
        with all_cores("decoding", contents.count, progress) as spread:
            for block in contents.blocks():
                rows = store[len(reasons) : len(reasons) + len(block)]
                # The default binds this block's: the function outlives no block.
                reasons += spread(
                    lambda i, block=block, rows=rows: _reason(block[i], shape, rows[i]), range(len(block))
                )
        if len(reasons) != contents.count:
            raise InputError(f"--data {source.name} was changed while it was read: try again")
        lines = [f"{contents.name(i)} ({reason})" for i, reason in enumerate(reasons) if reason]
        # A name may hold line breaks, and bytes that are not text.
        skipped.extend(printable(line) for line in lines)
        _refuse_unusable(source.name, skipped, len(reasons), skip_bad)
        usable.extend(i for i, reason in enumerate(reasons) if not reason)
        for row, origin in enumerate(usable if skipped else ()):
            store[row] = store[origin]

    build(key, contents.count, shape, fill)
    found = Findings(contents.count, tuple(skipped), contents.labels.of(usable))
    _write_findings(key, found)
    return found


def _place(key: str) -> Path:
    return cache_directory() / f"{key}.json"


def _write_findings(key: str, found: Findings) -> None:
    labels = found.labels
    values = {
        "count": found.count,
        "skipped": found.skipped,
        "labels": None if labels.values is None else labels.values.tolist(),
        "classes": labels.classes,
    }
    replace_file(_place(key), json.dumps(values).encode())


def _read_findings(key: str) -> Findings | None:
    """Read what was found out when a store was made; None where that is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
        values = json.loads(_place(key).read_text())
        count, skipped = int(values["count"]), tuple(map(str, values["skipped"]))
        numbers = None if values["labels"] is None else np.array(values["labels"], dtype=np.int64)
        if numbers is None or numbers.shape == (count - len(skipped),):
            return Findings(count, skipped, Labels(numbers, tuple(map(str, values["classes"]))))
    return None
