"""pytest-benchmark as the regression guard: it fires on a planted slowdown, and stays quiet without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# pytest-benchmark measures nothing where it sees a worker of pytest-xdist, which this process may be.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}

BENCHMARK = """
import time

def test_what_a_user_waits_for(benchmark):
    benchmark.pedantic(time.sleep, args=({seconds},), rounds=5)
"""

# Sleeping ends late on a busy machine, never early: the fastest of five rounds is hardly touched by others' work, and
# twice the time is not to be confused with it.
FAIL = "--benchmark-compare-fail=min:40%"


def run(folder: Path, seconds: float, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_sleep.py").write_text(BENCHMARK.format(seconds=seconds))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir=.", "--benchmark-only", *flags]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.slow
def test_the_guard_fires_on_a_planted_slowdown_and_on_nothing_else(tmp_path):
    first = run(tmp_path, 0.05, "--benchmark-autosave")
    assert first.returncode == 0, first.stdout + first.stderr
    assert list((tmp_path / ".benchmarks").rglob("*.json"))

    same = run(tmp_path, 0.05, "--benchmark-compare", FAIL)
    assert same.returncode == 0, same.stdout + same.stderr

    slower = run(tmp_path, 0.1, "--benchmark-compare", FAIL)
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr
