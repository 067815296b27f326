"""A folder's files are read once: what has not changed since is known from the cache, and what has is read again."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_fast.data import contents
from ddpm_fast.files import cache_directory


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files, written long ago as far as a test can tell."""
    monkeypatch.setattr(contents, "SETTLED_SECONDS", -1.0)
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode() * 5)
    return tmp_path


def read(folder: Path) -> tuple[list[bytes], int]:
    """Return the digests, and how many files were read for them."""
    counts = [0]

    def one_by_one(work: Callable[[int], bytes], count: int) -> list[bytes]:
        counts[0] += count
        return [work(i) for i in range(count)]

    return contents.digests(folder, sorted(folder.glob("*.png")), one_by_one), counts[0]


def test_files_are_read_once(folder):
    first, count = read(folder)
    assert (count, len(set(first))) == (3, 3)
    assert read(folder) == (first, 0)


def test_a_file_of_other_size_or_time_is_read_again(folder):
    first, _ = read(folder)
    (folder / "b.png").write_bytes(b"longer than before")
    second, count = read(folder)
    assert (count, [a == b for a, b in zip(first, second, strict=True)]) == (1, [True, False, True])
    status = (folder / "c.png").stat()
    (folder / "c.png").write_bytes(b"other")
    os.utime(folder / "c.png", ns=(status.st_atime_ns, status.st_mtime_ns))  # its entry's time tells
    third, count = read(folder)
    assert (count, third[2] == second[2]) == (1, False)


def test_new_and_removed_files_are_noticed(folder):
    first, _ = read(folder)
    (folder / "d.png").write_bytes(b"d")
    (folder / "a.png").unlink()
    second, count = read(folder)
    assert (count, second[:2], len(second)) == (1, first[1:], 3)


def test_a_file_that_was_just_changed_is_not_trusted(folder, monkeypatch):
    monkeypatch.setattr(contents, "SETTLED_SECONDS", 3600.0)
    assert [read(folder)[1], read(folder)[1]] == [3, 3]
    assert time.time() - (folder / "a.png").stat().st_mtime < 3600


@pytest.mark.parametrize("damage", ["", "[1]", '{"61": 3}', '{"612e706e67": [[1, 2, 3], "no hex"]}', "\x00"])
def test_a_damaged_cache_is_read_past(folder, damage):
    first, _ = read(folder)
    (file,) = cache_directory().glob("*.sha256")
    file.write_text(damage)
    assert read(folder) == (first, 3)


def test_a_cache_that_cannot_be_written_costs_time_only(folder, monkeypatch):
    (folder / "taken").write_text("a file, not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "taken"))
    assert read(folder) == read(folder)
