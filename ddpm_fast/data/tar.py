"""Tar files of pictures, as WebDataset has them: files of one name and several endings are one example.

    000017.jpg, 000017.cls, 000017.json: an image, the number or name of its class, and more, perhaps the class

They are read where they lie: nothing is ever unpacked to the disk.
"""

import contextlib
import itertools
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ddpm_fast.config import DataConfig
from ddpm_fast.data.folder import is_left_out
from ddpm_fast.data.image_files import is_picture
from ddpm_fast.data.labels import from_values
from ddpm_fast.data.pictures import Contents, Encoded
from ddpm_fast.errors import InputError, printable, require
from ddpm_fast.files import parse_json

AT_ONCE = 64
CLASS, FACTS = "cls", "json"
"""Endings of the files that say what class an example is of; of the latter by one of these keys."""
KEYS = ("label", "cls", "class")
LARGEST_TEXT = 1 << 20
"""Bytes of a file that says a class; a longer one is another thing."""


@dataclass(frozen=True)
class Picture:
    """Where a picture lies."""

    file: Path
    name: str
    first_byte: int
    size: int


@dataclass
class Example:
    """The files of one name in one tar, by their endings."""

    images: dict[str, Picture] = field(default_factory=dict)
    says: dict[str, bytes] = field(default_factory=dict)
    """What the files hold that may say its class."""


def look_through(name: str, files: Sequence[Path], data: DataConfig) -> Contents:
    """Return the pictures of tar files, in their order.

    Args:
        name: of the data set, for messages.
        files: at least one.
        data: which endings are meant.

    Raises:
        InputError: a file is damaged, holds what no data set needs, or not one picture for each example.
    """
    pictures, values = list[Picture](), list[Any]()
    for file in files:
        for key, example in _examples(file, data.label_column).items():
            ending = _image_ending(name, key, example, data.image_column)
            if ending:
                pictures.append(example.images[ending])
                values.append(_class_of(f"{file}: {key}", example, data.label_column))
    if not pictures:
        asked = f" of the ending {data.image_column}" if data.image_column else ""
        raise InputError(f"--data {name} holds no image{asked}")
    labels = from_values(values)
    require(
        not data.label_column or labels.values is not None,
        f"--label-column {data.label_column}: an example of {name} has neither such a file nor such a key in its .json",
    )
    return Contents(
        len(pictures), lambda i: f"{pictures[i].file.name}: {pictures[i].name}", lambda: _blocks(pictures), labels
    )


def _image_ending(name: str, key: str, example: Example, asked: str) -> str | None:
    """Return the ending of an example's picture; None where it has none."""
    if asked:
        return asked if asked in example.images else None
    endings = sorted(example.images)
    require(
        len(endings) < 2,
        f"--data {name}: {key} has several images: name one of {', '.join(endings)} by --image-column",
    )
    return endings[0] if endings else None


def _class_of(where: str, example: Example, asked: str) -> int | str | bool | None:
    """Return what an example's files say of its class."""
    said = example.says.get(asked or CLASS)
    if said is not None and (asked or CLASS) != FACTS:
        return said.decode("utf-8", "replace").strip() or None
    if FACTS not in example.says:
        return None
    try:
        facts = parse_json(example.says[FACTS])
    except ValueError as error:
        raise InputError(f"--data {where}.{FACTS} is no JSON ({error})") from None
    if not isinstance(facts, dict):
        return None
    value = next((facts[name] for name in ((asked,) if asked else KEYS) if name in facts), None)
    return value if isinstance(value, int | str) else None


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(file, "r:") as archive:
            yield archive
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--data {file} is damaged, compressed or no tar file ({error})") from None


def _members(file: Path, archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, PurePosixPath]]:
    """Yield the plain files of a tar; whatever else could reach out of it is refused, though nothing is unpacked."""
    while (member := archive.next()) is not None:
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep them all
        path = PurePosixPath(member.name)
        shown = printable(member.name)
        climbs = path.is_absolute() or ".." in path.parts
        require(not climbs, f"--data {file} holds {shown}, a path that leads out of it: make it anew without")
        plain = member.isreg() and not member.issparse()
        kind = "a link" if member.issym() or member.islnk() else "a device or another special file"
        require(plain or member.isdir(), f"--data {file} holds {shown}, {kind}: make it anew without")
        if plain and not is_left_out(path):
            yield member, path
    with file.open("rb") as opened:  # what is no header ends a tar too, without a word
        opened.seek(archive.offset)
        rest = opened.read(tarfile.BLOCKSIZE)
    if rest.strip(b"\0") or len(rest) not in (0, tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no more files from byte {archive.offset:,} on")


def _examples(file: Path, label: str) -> dict[str, Example]:
    """Return the examples of a tar by their keys, in their order."""
    examples = dict[str, Example]()
    with _opened(file) as archive:
        for member, path in _members(file, archive):
            stem, _, ending = path.name.partition(".")
            example, ending = examples.setdefault(str(path.with_name(stem)), Example()), ending.lower()
            if is_picture(path):
                require(ending not in example.images, f"--data {file} holds {path} twice: make it anew with one")
                example.images[ending] = Picture(file, member.name, member.offset_data, member.size)
            elif ending in (CLASS, FACTS, label) and member.size <= LARGEST_TEXT:
                opened = archive.extractfile(member)
                assert opened is not None
                example.says[ending] = opened.read()
    return examples


def _blocks(pictures: Sequence[Picture]) -> Iterator[list[Encoded]]:
    """Read the pictures' bytes from where they lie in their tars, which are not compressed."""
    for file, those in itertools.groupby(pictures, lambda picture: picture.file):
        with file.open("rb") as opened:
            while block := list(itertools.islice(those, AT_ONCE)):
                yield [_read(opened, picture) for picture in block]


def _read(opened: BinaryIO, picture: Picture) -> bytes:
    opened.seek(picture.first_byte)
    return opened.read(picture.size)
