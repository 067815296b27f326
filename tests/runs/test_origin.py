"""Which code made a run is kept, and a change of it is seen."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ddpm_fast.runs import origin
from ddpm_fast.runs.origin import PACKAGE, changed_since, read, read_sources, write

CPU = torch.device("cpu")


def test_every_source_file_is_kept_as_it_stands(tmp_path):
    write(tmp_path, 0, CPU)
    found = read(tmp_path)
    assert found is not None
    assert found.sources["diffusion/schedule.py"] == (PACKAGE / "diffusion/schedule.py").read_text()
    assert found.sources["kernels/q_sample.py"] == (PACKAGE / "kernels/q_sample.py").read_text()
    assert found.facts["command"] == sys.argv
    assert {"ddpm-fast", "python", "torch"} <= found.facts["versions"].keys()
    assert found.facts["files"] == found.digests
    with zipfile.ZipFile(tmp_path / "origin/step-0000000.zip") as archive:
        assert archive.testzip() is None
    assert changed_since(tmp_path) == []


def test_a_changed_file_is_named_if_it_decides_images(tmp_path, monkeypatch):
    write(tmp_path, 0, CPU)
    sources = read_sources()
    sources["diffusion/schedule.py"] += "# another thing\n"
    sources["model/new.py"] = ""
    sources["cli/main.py"] += "# no image follows from it\n"
    del sources["kernels/q_sample.py"]
    monkeypatch.setattr(origin, "read_sources", lambda: sources)
    assert changed_since(tmp_path) == ["diffusion/schedule.py", "kernels/q_sample.py", "model/new.py"]


def test_the_last_start_counts_and_a_damaged_record_is_none(tmp_path):
    assert read(tmp_path) is None
    write(tmp_path, 0, CPU)
    write(tmp_path, 600, CPU)
    found = read(tmp_path)
    assert found is not None
    assert found.step == 600
    (tmp_path / "origin/step-0000600.zip").write_bytes(b"torn")
    assert read(tmp_path) is None
    assert changed_since(tmp_path) == []


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
