"""group_norm_silu's kernels compile for Ampere, Hopper and Blackwell: no spills, 16-byte rows, registers to spare.

`python tests/kernels/compile_group_norm.py all` does the same for every shape of the presets, in minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_group_norm.py")
SHARED_LIMIT = 99 * 1024  # bytes a program may have on the smallest of these chips' kin
WRITES_PIXELS = ("normalize_kernel", "input_gradient_kernel")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_within_its_means(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "quick", str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["path"] for row in rows} == {"one tile", "loop", "split"}
    for row in rows:
        print(row)
        assert row["spilled"] == 0, row
        assert row["wide_loads"] > 0, row
        assert row["wide_stores"] > 0 or row["kernel"] not in WRITES_PIXELS, row
        assert row["shared"] <= SHARED_LIMIT, row
        assert row["blocks"] * row["num_warps"] >= 16 or row["num_warps"] == 1, row
