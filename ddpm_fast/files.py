"""Files that appear whole or not at all, one sentence when they cannot be written, and where the cache is."""

import contextlib
import errno
import glob
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_fast.errors import InputError

ANOTHER_OUT = "choose another --out"
"""What else helps where a run or images cannot be written."""


def cache_directory() -> Path:
    """Return where decoded images and compiled code live: $XDG_CACHE_HOME/ddpm-fast, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-fast"


@contextlib.contextmanager
def writing(path: Path, remedy: str = ANOTHER_OUT) -> Iterator[None]:
    """Turn a failure to write below `path` (no permission, disk full) into one line.

    Raises:
        InputError: something in the block raised OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason}; free some space or {remedy}") from None


def require_writable(directory: Path) -> None:
    """Refuse, before the work and without making it, a directory that could not be made or written to.

    Raises:
        InputError: the nearest directory above it that exists is a file, or not ours to write to.
    """
    with writing(directory):
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(existing, os.W_OK | os.X_OK):
            read_only = hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY
            number = errno.EROFS if read_only else errno.EACCES
            raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def whole(path: Path, sync: bool = True, remedy: str = ANOTHER_OUT) -> Iterator[Path]:
    """Put a file or a directory at `path` whole or not at all, in place of what was there.

    Args:
        path: where it shall be; missing parents are made.
        sync: wait until it is on the disk. A directory's files are written by `write_synced` for that.
        remedy: what else than free space helps.

    Yields:
        A temporary path in the same directory, of the same suffix, for the block to write.

    Raises:
        InputError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.stem}.{platform.node()}.{os.getpid()}.tmp{path.suffix}")
    old = temporary.with_name(f"{temporary.name}.old")
    with writing(path, remedy):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if sync:
                _sync(temporary)
            if path.is_dir():  # which no rename replaces; a kill between the two leaves none, but never half of one
                path.replace(old)
            temporary.replace(path)
            if sync:
                _sync(path.parent)  # the name, too
        finally:
            if old.exists() and not path.exists():
                old.replace(path)
            _remove(temporary)
            _remove(old)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    path.write_bytes(data)
    _sync(path)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with whole(path) as temporary:
        temporary.write_bytes(data)


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: it is none, or is nested deeper than anything of ours.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def clear_left_overs(directory: Path) -> None:
    """Remove what a process that was killed had begun to put into a directory by `whole`; nobody else writes to it."""
    for entry in directory.glob(".*.[0-9]*.tmp*"):
        _remove(entry)


def clear_left_overs_of_the_dead(directory: Path) -> None:
    """Remove the same from a directory to which others may be writing: what processes of this machine left that ended.

    Does nothing where no process can be asked whether it runs, as on Windows.
    """
    for entry in directory.glob(f".*.{glob.escape(platform.node())}.[0-9]*.tmp*") if os.name == "posix" else ():
        number = entry.name.partition(".tmp")[0].rpartition(".")[2]
        if number.isdecimal() and not _is_running(int(number)):
            _remove(entry)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # which sends nothing
    except PermissionError:  # it is another user's
        return True
    except (OSError, OverflowError):
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
