"""Which code made a run is kept, and a change of it is seen."""

import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddpm_fast.runs import origin
from ddpm_fast.runs.origin import PACKAGE, changed_since, read, read_sources, write

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Read the code anew for each test, and for those that follow."""
    forget()
    yield
    forget()


def forget() -> None:
    origin.read_sources.cache_clear()
    origin._commit_and_changes.cache_clear()


def test_every_source_file_is_kept_as_it_stands(tmp_path):
    write(tmp_path, 0, CPU)
    found = read(tmp_path)
    assert found is not None
    assert found.sources["diffusion/schedule.py"] == (PACKAGE / "diffusion/schedule.py").read_text()
    assert found.sources["kernels/q_sample.py"] == (PACKAGE / "kernels/q_sample.py").read_text()
    assert found.facts["command"] == "from Python"
    assert {"ddpm-fast", "python", "torch"} <= found.facts["versions"].keys()
    assert found.facts["files"] == found.digests
    with zipfile.ZipFile(tmp_path / "origin/step-0000000.zip") as archive:
        assert archive.testzip() is None
    assert changed_since(tmp_path) == []


def test_only_our_own_command_line_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/.venv/bin/ddpm-fast", "train", "--steps", "3"])
    write(tmp_path, 0, CPU)
    found = read(tmp_path)
    assert found is not None
    assert found.facts["command"] == ["/home/me/.venv/bin/ddpm-fast", "train", "--steps", "3"]


def test_a_changed_file_is_named_if_it_decides_images(tmp_path, monkeypatch):
    write(tmp_path, 0, CPU)
    sources = dict(read_sources())
    sources["diffusion/schedule.py"] += "# another thing\n"
    sources["model/new.py"] = ""
    sources["cli/main.py"] += "# no image follows from it\n"
    del sources["kernels/q_sample.py"]
    with monkeypatch.context() as patches:
        patches.setattr(origin, "read_sources", lambda: sources)
        changed = changed_since(tmp_path)
    assert changed == ["diffusion/schedule.py", "kernels/q_sample.py", "model/new.py"]


def test_the_last_start_counts_and_a_damaged_record_is_none(tmp_path):
    assert read(tmp_path) is None
    write(tmp_path, 0, CPU)
    write(tmp_path, 600, CPU)
    found = read(tmp_path)
    assert found is not None
    assert found.step == 600
    whole = (tmp_path / "origin/step-0000600.zip").read_bytes()
    for position in range(0, len(whole), len(whole) // 40):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        (tmp_path / "origin/step-0000600.zip").write_bytes(damaged)
        read(tmp_path)  # and nothing is raised
    (tmp_path / "origin/step-0000600.zip").write_bytes(b"torn")
    assert read(tmp_path) is None
    assert changed_since(tmp_path) == []


def test_what_unpacks_to_too_much_is_none_of_ours(tmp_path, monkeypatch):
    write(tmp_path, 0, CPU)
    monkeypatch.setattr(origin, "LARGEST_SOURCES", 1000)
    assert read(tmp_path) is None


def test_an_editor_s_lock_is_no_source(repository, tmp_path):
    (repository / "ddpm_fast/.#config.py").symlink_to("user@host.1234")
    (repository / "ddpm_fast/latin.py").write_bytes(b"# caf\xe9\n")
    assert set(read_sources()) == {"config.py", "latin.py"}


def test_an_edit_after_the_start_is_not_what_made_the_run(repository, tmp_path):
    origin.remember()
    (repository / "ddpm_fast/config.py").write_text("T = 100\n")
    write(tmp_path / "run", 0, CPU)
    found = read(tmp_path / "run")
    assert found is not None
    assert found.sources["config.py"] == "T = 1000\n"
    assert not (tmp_path / "run/origin/step-0000000.diff").exists()


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(directory), *identity, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """Return a repository that holds a small package, which stands for this one."""
    package = tmp_path / "repository/ddpm_fast"
    package.mkdir(parents=True)
    (package / "config.py").write_text("T = 1000\n")
    git(tmp_path / "repository", "init", "--quiet")
    git(tmp_path / "repository", "add", "--all")
    git(tmp_path / "repository", "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(origin, "PACKAGE", package)
    return tmp_path / "repository"


def test_the_commit_and_what_it_lacks_are_kept(repository, tmp_path):
    write(tmp_path / "clean", 0, CPU)
    assert not (tmp_path / "clean/origin/step-0000000.diff").exists()
    (repository / "ddpm_fast/config.py").write_text("T = 100\n")
    forget()
    write(tmp_path / "changed", 0, CPU)
    found = read(tmp_path / "changed")
    assert found is not None
    assert found.facts["commit"] == git(repository, "rev-parse", "HEAD")
    difference = (tmp_path / "changed/origin/step-0000000.diff").read_text()
    assert "-T = 1000\n+T = 100\n" in difference


def test_without_git_the_source_is_kept_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    write(tmp_path / "run", 0, CPU)
    found = read(tmp_path / "run")
    assert found is not None
    assert "commit" not in found.facts
    assert "config.py" in found.sources
