"""What every test needs: Triton's interpreter where there is no GPU, a cache of its own, one thread a worker.

A GPU is tested by one command, which runs in a source tree that is not installed as well:

    python -m pytest -m gpu -n 8 --dist worksteal

It runs what only a GPU can show, and all comparisons of kernels. Two that take far longer have markers of their own:
`sanitizer`, and `compile_matrix`, for which a CPU is enough.
"""

import os
from importlib.util import find_spec

import pytest
import torch

from ddpm_fast.engine.execution import set_tf32

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# Which run commands, on any machine: they need what a borrowed GPU may lack.
collect_ignore = [] if find_spec("tyro") and find_spec("hypothesis") else ["fuzz", "security"]
RUNS_KERNELS = ("tests/kernels/", "tests/ops/test_ops.py", "tests/engine/test_with_kernels.py")
APART = ("sanitizer", "compile_matrix")


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; mark what runs kernels, which without a GPU are interpreted."""
    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and there is none"))
        elif item.nodeid.startswith(RUNS_KERNELS) and not any(map(item.get_closest_marker, APART)):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep decoded images out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """Let no convolution round float32 to TF32, as PyTorch does by itself: tests hold float32 to float32's rounding."""
    set_tf32("fp32")


class Clock:
    """A time that passes when told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a clock in the place of `time.perf_counter`."""
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock.perf_counter)
    return clock
