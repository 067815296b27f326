"""Real processes and real signals: what was asked to stop says so and ends, wherever it is, with whole files only."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro")

SOON = 20.0
"""Seconds, of a machine that does other things as well; when it is idle the process ends in one."""
SLOW = "--preset mnist --channels 64 --channel-multipliers 1 2 2 --res-blocks 2 --batch-size 2 --device cpu --out run"


def interrupted(directory: Path, arguments: str, said: str, number: int) -> tuple[int, str]:
    """Run a command, send it a signal once it has said something; return its exit status and all that it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "ddpm_fast", *arguments.split()]
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        output = ""
        while said not in output:
            character = process.stdout.read(1)
            assert character, output
            output += character
        time.sleep(0.5)
        sent = time.perf_counter()
        process.send_signal(number)
        output += process.stdout.read()
        status = process.wait()
    assert time.perf_counter() - sent < SOON
    assert list(directory.rglob(".*")) == []
    return status, output


WHILE_NUMPY_IS_IMPORTED = """
import signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy.lib._npyio_impl":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
from ddpm_fast.cli.main import main
main(["train", "--device", "cpu", "--steps", "1", "--out", "run"])
"""


def test_a_signal_is_obeyed_while_numpy_is_imported(tmp_path):
    """PyTorch's C++ imports NumPy, too, and goes on with half of it where a signal ends that."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", WHILE_NUMPY_IS_IMPORTED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "ddpm-fast: SIGINT: interrupted; nothing was written\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_grid_is_left_and_the_steps_are_kept(tmp_path, number):
    np.save(tmp_path / "images.npy", np.zeros((8, 28, 28), dtype=np.uint8))
    status, output = interrupted(tmp_path, f"train {SLOW} --data images.npy --steps 1", "step 1 of 1", number)
    assert status == 128 + number
    assert "saved step 1" in output
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-0000001\n"


@pytest.mark.slow
def test_checks_are_left_at_once_and_nothing_is_written(tmp_path):
    status, output = interrupted(tmp_path, "train --device cpu --out run", "checking the mathematics", signal.SIGTERM)
    assert (status, output.splitlines()[-1].endswith("SIGTERM: interrupted; nothing was written")) == (143, True)
    assert not (tmp_path / "run").exists()
