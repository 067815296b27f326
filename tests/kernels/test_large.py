"""Tensors past 2**31 elements: the last image is what it is in a batch of its own.

Shapes: N images, C channels, H x W pixels.
"""

import fcntl
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from ddpm_fast.kernels.group_norm_silu import group_norm_silu
from ddpm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_backward
from ddpm_fast.kernels.q_sample import q_sample
from ddpm_fast.kernels.reverse_step import reverse_step
from ddpm_fast.kernels.timestep_embedding import timestep_embedding

ELEMENTS = 2**31
MEMORY = 40 * 2**30  # bytes; the largest test's tensors have 12 * 2**30 (x and out of a reverse_step)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < MEMORY,
        reason="needs a GPU with 40 GiB",
    ),
]


@pytest.fixture(autouse=True)
def poison() -> None:
    """Leave new tensors alone, unlike the other tests: filling these takes longer than computing them."""


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let one process at a time hold such tensors, and none keep their memory: several may test on one GPU."""
    with (tmp_path_factory.getbasetemp().parent / "large-tensors").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def batch(C: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return images [N, C, size, size] as NHWC, one more than 2**31 elements hold; the last counts up, others are 0."""
    N = ELEMENTS // (C * size * size) + 2
    images = torch.zeros(N, size, size, C, dtype=dtype, device=device)
    images[-1] = torch.arange(C * size * size, device=device).view(size, size, C) % 113
    return images.permute(0, 3, 1, 2)


def lookups(N: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return t, the training table, key and sample_index."""
    table = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)).to(device)
    words = torch.arange(N, device=device)
    return words % 9, table, torch.tensor([5, 7], device=device), words


@pytest.mark.parametrize("size", [1024])
def test_q_sample_and_noise_mse(device, size):
    images = batch(3, size, torch.uint8, device)
    t, table, key, index = lookups(len(images), device)
    last = (images[-1:], t[-1:], table, key, index[-1:])
    options = {"flip": True, "dtype": torch.bfloat16}
    x_t = q_sample(images, t, table, key, index, **options)
    assert torch.equal(x_t[-1:], q_sample(*last, **options))
    assert torch.equal(noise_mse(x_t, images, t, table, key, index)[-1:], noise_mse(x_t[-1:], *last))
    grad = torch.ones(len(images), device=device)
    gradient = noise_mse_backward(grad, x_t, images, t, table, key, index)
    assert torch.equal(gradient[-1:], noise_mse_backward(grad[-1:], x_t[-1:], *last))


@pytest.mark.parametrize("size", [1024])
def test_reverse_step(device, size):
    x, out = batch(3, size, torch.float32, device), batch(3, size, torch.bfloat16, device)
    rows = torch.rand(9, 8, generator=torch.Generator().manual_seed(0)).to(device)
    key, index = torch.tensor([5, 7], device=device), torch.arange(len(x), device=device)
    step = torch.tensor([4], device=device)
    last = x[-1:].clone(memory_format=torch.channels_last)
    reverse_step(x, out, rows, step, key, index, None, None, clip=True, noisy=True)
    reverse_step(last, out[-1:], rows, step, key, index[-1:], None, None, clip=True, noisy=True)
    assert torch.equal(x[-1:], last)


@pytest.mark.parametrize("size", [16, 512])
def test_group_norm_silu(device, size):
    """In one tile, and split into slices of pixels."""
    x = batch(64, size, torch.bfloat16, device)
    weight, bias = torch.rand(64, device=device), torch.rand(64, device=device)
    index, key = torch.arange(len(x), device=device), torch.tensor([5, 7], device=device)
    options = {"groups": 32, "key": key, "probability": 0.3, "layer": 2}
    y, mean, rstd = group_norm_silu(x, weight, bias, sample_index=index, **options)
    alone = group_norm_silu(x[-1:], weight, bias, sample_index=index[-1:], **options)
    assert torch.equal(y[-1:], alone[0])
    dx = group_norm_silu_backward(y, mean, rstd, x, weight, bias, sample_index=index, **options)[0]
    last = (y[-1:], mean[-1:], rstd[-1:], x[-1:], weight, bias)
    assert torch.equal(dx[-1:], group_norm_silu_backward(*last, sample_index=index[-1:], **options)[0])


@pytest.mark.parametrize("dim", [1024])
def test_timestep_embedding(device, dim):
    t = torch.arange(ELEMENTS // dim + 2, device=device) % 1000
    assert torch.equal(timestep_embedding(t, dim)[-1:], timestep_embedding(t[-1:], dim))
