"""One run at a time in a directory: a lock of the system, which ends with the process however that ends."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ddpm_fast.errors import InputError
from ddpm_fast.files import writing

NAME = ".lock"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other runs out of a directory, made where it is missing, and taken away again if nothing comes into it.

    Raises:
        InputError: another run is in it, or it cannot be written.
    """
    file, made = run / NAME, [path for path in (run, *run.parents) if not path.exists()]
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"{run} is being trained by {_owner(file)}: wait until that has ended, or name another --out"
            ) from None
    try:
        with writing(run):
            file.write_text(f"process {os.getpid()} on {platform.node()}\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # before it is released: who waits for it sees that it is gone, and makes a new one
            for path in made:
                path.rmdir()
        lock.release()


def _owner(file: Path) -> str:
    try:
        return file.read_text().strip() or "another process"
    except (OSError, ValueError):
        return "another process"
