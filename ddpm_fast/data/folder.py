"""A folder of pictures, whose own folders may be the classes."""

import os
from pathlib import Path, PurePath

from ddpm_fast.data import contents
from ddpm_fast.data.image_files import is_picture
from ddpm_fast.data.labels import from_folders
from ddpm_fast.data.pictures import Contents, Source
from ddpm_fast.data.store import in_parallel

LEFT_BY_OTHERS = ("__MACOSX", "Thumbs.db", "desktop.ini")
"""What archivers and file managers leave in folders."""


def is_left_out(path: PurePath) -> bool:
    """Whether a path inside a data set is no content of it: hidden, or some program's own."""
    return any(part.startswith(".") or part in LEFT_BY_OTHERS for part in path.parts)


def files_of(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files of a folder, and of all folders in it, that have one of these endings; without any, pictures."""
    found = (file for file in folder.rglob("*") if not is_left_out(file.relative_to(folder)))
    return sorted(
        file for file in found if (file.suffix.lower() in suffixes if suffixes else is_picture(file)) and file.is_file()
    )


def digests_of(folder: Path, files: list[Path], progress: bool) -> list[bytes]:
    """Return a digest of the content of each of a folder's files."""
    return contents.digests(folder, files, lambda work, count: in_parallel("reading", work, count, progress))


def picture_folder(name: str, folder: Path, files: list[Path], progress: bool) -> Source:
    """Return a folder's pictures as a source, known by their names and contents."""
    relative = [file.relative_to(folder) for file in files]
    identity = (*(os.fsencode(path) for path in relative), *digests_of(folder, files, progress))
    found = Contents(len(files), lambda i: str(relative[i]), lambda: [files], from_folders(relative))
    return Source(name, identity, lambda: found)
