"""Files appear whole or not at all; what cannot be written is one line."""

from pathlib import Path

import pytest

from ddpm_fast import files
from ddpm_fast.errors import InputError


def fail(path: Path, error: BaseException) -> None:
    """Write half of what shall be there, and raise."""
    with files.whole(path) as temporary:
        if path.is_dir():
            temporary.mkdir()
            temporary /= "file"
        temporary.write_text("half")
        raise error


def test_what_was_written_replaces_what_was_there(tmp_path):
    path = tmp_path / "made/a.txt"
    for content in ("first", "second"):
        with files.whole(path) as temporary:
            temporary.write_text(content)
            assert temporary.suffix == ".txt"
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), InputError("refused")])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("kept")
    with pytest.raises(type(error)):
        fail(path, error)
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_replaces_a_directory(tmp_path):
    path = tmp_path / "step-1"
    for name in ("a", "b"):
        with files.whole(path) as temporary:
            temporary.mkdir()
            files.write_synced(temporary / name, b"1")
        assert [entry.name for entry in path.iterdir()] == [name]
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device; free some space or"):
        fail(path, OSError(28, "No space left on device"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("name", ["", "made/below", "file", "file/below"])
def test_a_directory_is_known_to_be_writable_before_it_is_made(tmp_path, name):
    (tmp_path / "file").write_text("")
    if name.startswith("file"):
        with pytest.raises(InputError, match=r"cannot write .*Not a directory"):
            files.require_writable(tmp_path / name)
    else:
        files.require_writable(tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_no_permission_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InputError, match="cannot write below: Permission denied"):
        files.require_writable(Path("below"))
