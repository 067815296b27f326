"""A source tree that is not installed, beside few packages, as on a borrowed GPU: its tests are found, a run starts."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABSENT = ("ddpm_fast", "diffusers", "docstring_parser", "huggingface_hub", "hypothesis", "msgspec", "pyarrow", "shtab")
ABSENT += ("sklearn", "tyro", "typeguard")
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Return what runs Python in a copy of the tree, with all packages that are installed here but those."""
    tree, packages = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("packages")
    for name in ("bench", "ddpm_fast", "kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    for path in (entry for place in sys.path if place.endswith("-packages") for entry in Path(place).iterdir()):
        if not any(name in path.name for name in ABSENT) and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *arguments]  # -S: without the place where packages are installed
        environment = os.environ | {"PYTHONPATH": str(packages)}
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)

    return run


def test_absent_is_absent(python: Python) -> None:
    names = ", ".join(ABSENT[1:])
    code = f"from importlib import metadata, util; print([n for n in '{names}'.split(', ') if util.find_spec(n)]); "
    done = python("-c", code + "metadata.version('ddpm-fast')")
    assert done.stdout.strip() == "[]"
    assert "PackageNotFoundError" in done.stderr


def test_the_gpus_tests_are_collected_without_the_two_long_ones(python: Python) -> None:
    done = python("-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {Path(line.partition("::")[0]) for line in done.stdout.splitlines() if "::" in line}
    kernels = {path.relative_to(ROOT) for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    long = {Path("tests/kernels/test_compile.py"), Path("tests/kernels/test_sanitizer.py")}
    others = {"data/test_batches.py", "engine/test_cuda_graphs.py", "engine/test_with_kernels.py", "ops/test_ops.py"}
    assert long < kernels
    assert found >= (kernels - long) | {Path("tests") / name for name in others}
    assert not found & long


def test_a_run_is_prepared(python: Python, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from ddpm_fast.presets import PRESETS
from ddpm_fast.runs import directory, run
directory.prepare(Path({str(tmp_path)!r}), PRESETS["digits"], "fingerprint", 0)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "config.json").read_text())["versions"]) == {"ddpm-fast", "torch", "python"}
