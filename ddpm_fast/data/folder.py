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


def _runs_in(folder: Path, found: list[Path]) -> set[Path]:
    """Return the run directories among what is in a folder: their grids are made from its pictures, and none of them.

    A run that began in its own data would otherwise not find the same data again.
    """
    parents = {file.parent for file in found if file.name == "checkpoints" and file.is_dir()}
    return {parent for parent in parents if parent != folder and (parent / "config.json").is_file()}


def files_of(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files of a folder, and of all folders in it, that have one of these endings; without any, pictures."""
    found = [file for file in folder.rglob("*") if not is_left_out(file.relative_to(folder))]
    if runs := _runs_in(folder, found):
        found = [file for file in found if runs.isdisjoint(file.parents)]
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
