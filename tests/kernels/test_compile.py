"""Every kernel compiles for every architecture as the presets launch it: no spills, wide vectors, few registers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.compile_matrix
SCRIPT = Path(__file__).with_name("compile_all.py")
ARCHITECTURES = (80, 90, 100)
FEW = {
    "q_sample": {"q_sample_kernel"},
    "noise_mse": {"noise_mse_kernel", "noise_mse_mean_kernel", "noise_mse_backward_kernel"},
    "reverse_step": {"reverse_step_kernel"},
    "timestep_embedding": {"timestep_embedding_kernel"},
    "group_norm_parameters": {"parameter_gradient_kernel"},
    "adam_ema": {"adam_norm_kernel", "adam_scalars_kernel", "adam_ema_kernel"},
}
NORMS = {
    "group_norm_silu": {"statistics_kernel", "normalize_kernel"},
    "group_norm_silu_backward": {"sums_kernel", "input_gradient_kernel"},
}
# GroupNorm has some hundred specialisations: a part takes a minute or less.
PARTS = [(tuple(FEW), ARCHITECTURES), *(((op,), (sm,)) for op in NORMS for sm in ARCHITECTURES)]


def compile_kernels(
    ops: tuple[str, ...], architectures: tuple[int, ...], *options: str
) -> tuple[int, list[dict[str, Any]], str]:
    """Run compile_all in a process without the interpreter: exit status, rows, failures."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--json", "--processes", "1", "--only", *ops, "--sm", *map(str, architectures)]
    command += options
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout) if done.stdout else [], done.stderr


def assert_compiles_well(ops: tuple[str, ...], architectures: tuple[int, ...], *options: str) -> None:
    status, rows, failures = compile_kernels(ops, architectures, *options)
    print(*rows, sep="\n")
    assert status == 0, failures
    assert {row["architecture"] for row in rows} == set(architectures)
    assert {row["kernel"] for row in rows} == set.union(*((FEW | NORMS)[op] for op in ops))
    assert all(row["spill_bytes"] == 0 and 0 < row["registers"] <= 128 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("ops", "architectures"), PARTS, ids=str)
def test_compiles_without_spills_and_with_wide_vectors(ops, architectures):
    assert_compiles_well(ops, architectures)


@pytest.mark.slow
def test_every_kernel_compiles_once_for_every_architecture():
    assert_compiles_well(tuple(FEW | NORMS), ARCHITECTURES, "--few")


def test_a_kernel_that_spills_is_found():
    status, rows, failures = compile_kernels(("planted",), ARCHITECTURES)
    assert status == 1
    assert failures.count("spills") == len(rows) == len(ARCHITECTURES)
    assert all(row["spill_bytes"] > 0 for row in rows)
