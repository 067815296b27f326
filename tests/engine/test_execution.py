"""How steps are run: what is compiled where, and how the C library is set."""

import os
import subprocess
import sys

import pytest
import torch

from ddpm_fast.engine.execution import COMPILING_PAYS_FROM, CPU_FLOP_RATE, EAGER, Execution, choose_execution

PAGE_FAULTS = """
import platform, resource, sys, torch
from ddpm_fast.presets import PRESETS
from ddpm_fast.engine.execution import disable_malloc_trim
from ddpm_fast.engine.trainer import Trainer
if platform.libc_ver()[0] != "glibc":
    print("none"), sys.exit()
if sys.argv[1] == "keep":
    disable_malloc_trim()

def batch(first, n):
    return torch.zeros(n, 1, 8, 8, dtype=torch.uint8), torch.arange(first, first + n)

trainer = Trainer(PRESETS["digits"], batch, torch.device("cpu"))
for step in range(8):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    trainer.train_step_no_sync()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("compile", "capture", "device", "expected"),
    [
        (True, True, "cuda", Execution(True, True)),
        (False, True, "cuda", Execution(False, True)),
        (True, False, "cuda", Execution(True, False)),
        (True, True, "cpu", EAGER),
    ],
)
def test_flags_take_layers_away_and_a_cpu_has_none(compile, capture, device, expected):
    assert choose_execution(compile, capture, torch.device(device)) == expected


def test_a_long_sampling_is_compiled_on_a_cpu_with_a_compiler(monkeypatch):
    enough = COMPILING_PAYS_FROM * CPU_FLOP_RATE * torch.get_num_threads()
    cpu = torch.device("cpu")
    monkeypatch.setattr("ddpm_fast.engine.execution.can_compile_for_cpu", lambda: True)
    assert choose_execution(True, True, cpu, enough) == Execution(compiled=True)
    assert choose_execution(True, True, cpu, enough / 2) == EAGER
    assert choose_execution(False, True, cpu, enough) == EAGER
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert choose_execution(True, True, cpu, enough) == EAGER


def page_faults(how: str, **variables: str) -> int:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PAGE_FAULTS, how]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**environment, **variables})
    if result.stdout.strip() == "none":
        pytest.skip("only glibc has these settings")
    return int(result.stdout)


@pytest.mark.slow
def test_memory_that_a_training_step_freed_is_kept_for_the_next_step():
    kept, left, users = page_faults("keep"), page_faults("leave"), page_faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert 5 * kept < left
    assert 5 * kept < users  # whose own setting stays
