"""What every test needs: Triton's interpreter where there is no GPU, a cache of its own, one thread a worker."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


RUNS_KERNELS = ("tests/kernels/", "tests/ops/test_ops.py", "tests/engine/test_with_kernels.py")


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; where there is one, let `-m gpu` repeat all comparisons of kernels."""
    for item in items:
        if torch.cuda.is_available():
            if item.nodeid.startswith(RUNS_KERNELS):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and there is none"))


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep decoded images out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
