"""Every kernel compiles for every architecture without spills, with 16-byte vectors where the data is bulk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "compile_all.py"
KERNELS = ["q_sample", "noise_mse", "noise_mse_backward", "noise_mse_mean", "reverse_step", "timestep_embedding"]


def compile_kernels(only: str) -> subprocess.CompletedProcess[str]:
    """Run compile_all in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--only", only, "--json", "--processes", "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spills_and_with_wide_vectors(kernel):
    done = compile_kernels(kernel)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    print(*rows, sep="\n")
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    assert all(row["spill_bytes"] == 0 and row["registers"] > 0 for row in rows)


def test_a_kernel_that_spills_is_found():
    done = compile_kernels("planted")
    assert done.returncode == 1
    assert "spills" in done.stderr
    assert all(row["spill_bytes"] > 0 for row in json.loads(done.stdout))
