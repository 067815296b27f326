"""compute-sanitizer finds no access out of bounds and no race in any launcher."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
PROGRAM = shutil.which("compute-sanitizer") or (str(CUDA) if CUDA.exists() else None)


@pytest.mark.sanitizer
@pytest.mark.skipif(not torch.cuda.is_available() or PROGRAM is None, reason="needs a GPU and compute-sanitizer")
@pytest.mark.timeout(1800)  # it slows kernels down a hundredfold
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """On a reduced set: every launcher twice, on an allocator that leaves memory between tensors unowned."""
    tests = [str(Path(__file__).with_name("test_every_launcher.py")), "-k", "two_runs", "-p", "no:cacheprovider"]
    command = [PROGRAM, "--tool", tool, sys.executable, "-m", "pytest", *tests]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    if summary is None:
        pytest.skip(f"compute-sanitizer refuses to run here: {said[-400:]}")
    assert int(summary[1]) == 0, said
    assert re.search(r"[1-9]\d* passed", said), said
