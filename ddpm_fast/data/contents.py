"""Digests of files' contents: each file is read once, and again only when its size or one of its times has changed."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpm_fast.errors import InputError
from ddpm_fast.files import cache_directory, replace_file

SETTLED_SECONDS = 2.0
"""A file that was changed so shortly ago may be changed once more within the same tick of the disk's clock."""

Facts = list[int]
"""Of a file: bytes, and the times in nanoseconds at which its content and its entry were last changed."""


def digests(
    folder: Path, files: Sequence[Path], in_parallel: Callable[[Callable[[int], bytes], int], list[bytes]]
) -> list[bytes]:
    """Return a digest of each file of a folder.

    Args:
        folder: by whose path earlier digests are kept in the cache.
        files: in it.
        in_parallel: returns work(0) .. work(n - 1).
    """
    known, now = _known(folder), time.time_ns()
    names = [os.fsencode(file.relative_to(folder)).hex() for file in files]
    facts = [_facts(file) for file in files]
    found = [known[n][1] if n in known and known[n][0] == f else None for n, f in zip(names, facts, strict=True)]
    missing = [i for i, digest in enumerate(found) if digest is None]
    if missing:
        for i, digest in zip(missing, in_parallel(lambda j: _digest(files[missing[j]]), len(missing)), strict=True):
            found[i] = digest.hex()
        settled = now - int(SETTLED_SECONDS * 1e9)
        kept = {n: (f, d) for n, f, d in zip(names, facts, found, strict=True) if f and max(f[1:]) < settled}
        if kept:
            with contextlib.suppress(InputError):  # a cache that cannot be written costs time, no more
                replace_file(_place(folder), json.dumps(kept).encode())
    return [bytes.fromhex(digest) for digest in found if digest is not None]


def _place(folder: Path) -> Path:
    return cache_directory() / f"{hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=20).hexdigest()}.sha256"


def _known(folder: Path) -> dict[str, tuple[Facts, str]]:
    """Read what is kept of a folder; nothing where that is missing or damaged."""
    try:
        kept = json.loads(_place(folder).read_text())
        return {
            str(name): (list(map(int, facts)), bytes.fromhex(digest).hex()) for name, (facts, digest) in kept.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _facts(file: Path) -> Facts:
    with contextlib.suppress(OSError):
        status = file.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return []


def _digest(file: Path) -> bytes:
    with contextlib.suppress(OSError), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()  # as the hub names files, see `hub`
    return b"unreadable"
