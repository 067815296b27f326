"""The rule by which a kernel is held to its reference, stated once, and tensors that are poisoned before use."""

import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor

from ddpm_fast.diffusion import noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMAL_ERROR = 4 * 2.0**-23  # of the radius, as kernels/philox.py promises


def _assert_within(found: Tensor, plain: Tensor, truth: Tensor, derived: float = 0.0, name: str = "") -> None:
    """Check error(kernel) <= 2 * error(plain PyTorch in the same dtype) + eps(dtype) * max|truth| + derived.

    The truth is float64. Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds: half an ulp more.
    derived: what the kernel's own arithmetic may cost, by a bound that the test derives from the data in float64.
    Plain PyTorch's error is no measure of it where there are few numbers (it may be right by luck), where they cancel,
    or where noise counts, which the kernel makes by other polynomials.
    """
    assert found.shape == truth.shape == plain.shape, name
    assert found.dtype == plain.dtype, name
    if truth.numel() == 0:
        return
    error, plain_error = ((value.double() - truth.double()).abs().max().item() for value in (found, plain))
    eps = torch.finfo(found.dtype).eps * (1.5 if found.dtype == torch.bfloat16 and DEVICE == "cpu" else 1)
    bound = 2 * plain_error + eps * truth.abs().max().item() + derived
    assert error <= bound, f"{name} error {error:.3g}, bound {bound:.3g} (plain PyTorch: {plain_error:.3g})"


@pytest.fixture
def assert_within() -> Callable[..., None]:
    return _assert_within


def _noise_and_error(
    key: Tensor, sample_index: Tensor, step: int, stream: noise.Stream, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return the noise at an address, and how far from it a kernel's may lie: [N, C, H, W] float64 each."""
    _, channels, height, width = shape
    address, whole = noise.NoiseAddress(key, sample_index), 4 * math.ceil(channels / 4)
    z = noise.normal(address, step, stream, (whole, height, width), torch.float64)
    radius = torch.hypot(z[:, 0::2], z[:, 1::2]).repeat_interleave(2, dim=1)
    return z[:, :channels], NORMAL_ERROR * radius[:, :channels]


@pytest.fixture
def noise_and_error() -> Callable[..., tuple[Tensor, Tensor]]:
    return _noise_and_error


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=range(10))
def draw(request: pytest.FixtureRequest) -> Random:
    """Choose any arguments that a kernel takes, the same in every run: a commit that passed passes again.

    Small shapes: the interpreter takes about 2.6 ms for a program's every step.
    """
    return Random(request.param)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every new tensor of the launchers with NaN, so that what a kernel leaves out shows."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args, **kwargs) -> Tensor:
            value = make(*args, **kwargs)
            return value.fill_(torch.nan) if value.is_floating_point() else value  # the interpreter makes integers

        return poisoned

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))
