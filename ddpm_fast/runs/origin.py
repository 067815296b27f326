"""Which code made a run: its source, git's view of it, the command line and the versions, kept beside what it made.

runs/NAME/origin/
  step-0000000.json   the command line, versions, device, git's commit, and a digest of each source file
  step-0000000.zip    the source of ddpm_fast, kernels included
  step-0000000.diff   what git had not committed of it, where there was anything
A run that is continued adds three more, named by the step that it continues from.
"""

import functools
import hashlib
import io
import json
import platform
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddpm_fast import __version__
from ddpm_fast.files import parse_json, replace_file

PACKAGE = Path(__file__).parents[1]
DECIDES_IMAGES = ("diffusion/", "model/", "ops/", "kernels/", "engine/", "constants.py")
"""What sampling runs through: a change here may change an image."""
OF_INTEREST = ("torch", "triton", "numpy", "safetensors")
EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The least time that a zip file can hold: equal sources are equal bytes."""

LARGEST_SOURCES = 50_000_000
"""Bytes; a file that unpacks to more is none of ours."""
DAMAGED = (OSError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading JSON or a zip file that was damaged may raise."""

Sources = dict[str, str]
"""Text of each source file by its path in the package, "diffusion/schedule.py" say."""


@dataclass(frozen=True)
class Origin:
    """What made a run, or continued it."""

    step: int
    """That it started from."""
    facts: dict[str, Any]
    sources: Sources

    @property
    def digests(self) -> dict[str, str]:
        return {path: _digest(text) for path, text in self.sources.items()}


@functools.cache
def read_sources() -> Sources:
    """Return the code that is running: as it stood on the disk when this was first called, see `remember`."""
    roots = (PACKAGE, PACKAGE / "kernels")  # the second is a symbolic link, which rglob may not follow
    found = (file for root in roots for file in root.rglob("*.py"))
    files = {file.relative_to(PACKAGE).as_posix(): file for file in found if file.is_file() and file.name[0] != "."}
    return {path: files[path].read_text(encoding="utf-8", errors="replace") for path in sorted(files)}


@functools.cache
def _commit_and_changes() -> tuple[str | None, str]:
    """Return git's commit of the code that is running, and what is not committed of it; None where git has it not."""
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", "config.py") else None
    if commit is None:
        return None, ""
    return commit.strip(), _git("diff", "--no-color", "--no-ext-diff", "HEAD", "--", ".", "../kernels") or ""


def remember() -> None:
    """Read now which code is running: it may be edited before the run that it makes is written down."""
    read_sources()
    _commit_and_changes()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _git(*arguments: str) -> str | None:
    """Return what git says of the package's directory; None without git, or outside a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    found = {"ddpm-fast": __version__, "python": platform.python_version()}
    for name in OF_INTEREST:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a run is made by: command line, versions, device, and git's commit of the code."""
    facts: dict[str, Any] = {
        "command": _command(),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        facts["driver"] = _driver()
    commit, _ = _commit_and_changes()
    if commit is not None:
        facts["commit"] = commit
    return facts


def _command() -> list[str] | str:
    """Return the command line, if it is ours: another program's may hold what is not ours to keep."""
    program = Path(sys.argv[0])
    ours = program.name == "ddpm-fast" or program == PACKAGE / "__main__.py"
    return sys.argv if ours else "from Python"


def _driver() -> str | None:
    """Return the NVIDIA driver's version, from where Linux keeps it."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _path(run: Path, step: int, suffix: str) -> Path:
    return run / "origin" / f"step-{step:07d}.{suffix}"


def write(run: Path, step: int, device: torch.device) -> None:
    """Keep what starts a run at a step.

    Raises:
        InputError: it cannot be written.
    """
    sources, facts = read_sources(), describe(device)
    _, uncommitted = _commit_and_changes()
    facts["files"] = {path: _digest(text) for path, text in sources.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, text in sources.items():
            archive.writestr(zipfile.ZipInfo(path, EARLIEST), text, zipfile.ZIP_DEFLATED)
    replace_file(_path(run, step, "zip"), buffer.getvalue())
    if uncommitted:
        replace_file(_path(run, step, "diff"), uncommitted.encode())
    else:
        _path(run, step, "diff").unlink(missing_ok=True)  # of an earlier start
    replace_file(_path(run, step, "json"), (json.dumps(facts, indent=2) + "\n").encode())


def read(run: Path) -> Origin | None:
    """Return what last started or continued a run; None where that is not on record, or is damaged."""
    records = sorted((run / "origin").glob("step-*.json"))
    if not records:
        return None
    file = records[-1]
    try:
        facts = parse_json(file.read_text())
        with zipfile.ZipFile(file.with_suffix(".zip")) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST_SOURCES:
                return None
            sources = {name: archive.read(name).decode() for name in sorted(archive.namelist())}
        if not isinstance(facts.get("versions", {}), dict):
            return None
        return Origin(int(file.stem.removeprefix("step-")), dict(facts), sources)
    except DAMAGED:
        return None


def changed_since(run: Path) -> list[str]:
    """Return the source files that decide images and are not what they were when a run was made."""
    made_by = read(run)
    if made_by is None:
        return []
    before, now = made_by.digests, {path: _digest(text) for path, text in read_sources().items()}
    paths = sorted(before.keys() | now.keys())
    return [path for path in paths if path.startswith(DECIDES_IMAGES) and before.get(path) != now.get(path)]


def images_digest() -> str:
    """Return a digest of all the code that decides images, as it stood when this was first called."""
    deciding = [f"{path} {_digest(text)}" for path, text in read_sources().items() if path.startswith(DECIDES_IMAGES)]
    return _digest("\n".join(deciding))
