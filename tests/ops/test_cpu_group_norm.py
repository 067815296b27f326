"""GroupNorm of narrow groups on a CPU against PyTorch's own, in float64 and by finite differences."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.ops import reference
from ddpm_fast.ops.cpu_group_norm import ends_pytorch, group_norm, narrow_group_norm, pays_for

EPS = 1e-6


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.manual_seed(0)
    x = (3 + 2 * torch.randn(shape, generator=generator, dtype=dtype)).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=dtype)
    return x, weight, bias


def test_a_group_of_one_number_is_left_with_its_bias():
    x, weight, bias = torch.randn(1, 4, 1, 1), torch.ones(4), torch.arange(4.0)
    rounding = 2 * torch.finfo(torch.float32).eps * EPS**-0.5 * float(x.abs().max())
    torch.testing.assert_close(group_norm(x, 4, weight, bias, EPS).flatten(), bias, atol=rounding, rtol=0)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_it_is_pytorchs_group_norm(groups):
    x, weight, bias = tensors((3, 12, 5, 4))
    y = narrow_group_norm(x, groups, weight, bias, EPS)
    torch.testing.assert_close(y, F.group_norm(x, groups, weight, bias, EPS))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("groups", [2, 6])
def test_its_gradients_are_those_of_finite_differences(groups):
    inputs = [tensor.requires_grad_() for tensor in tensors((2, 6, 3, 2))]
    assert torch.autograd.gradcheck(lambda x, weight, bias: narrow_group_norm(x, groups, weight, bias, EPS), inputs)


def test_a_large_mean_costs_no_precision():
    x, weight, bias = tensors((2, 8, 16, 16), torch.float32)
    x = x + 1000
    wide = F.group_norm(x.double(), 8, weight.double(), bias.double(), EPS)
    error = (narrow_group_norm(x, 8, weight, bias, EPS) - wide).abs().max()
    assert error < 1e-3  # x itself is rounded to 6e-5; E[x^2] - E[x]^2 would be off by 0.06 and more


def test_a_cpu_takes_it_where_it_pays_and_computes_the_same():
    x, weight, bias = tensors((64, 32, 16, 16), torch.float32)
    shift = torch.randn(64, 32)
    assert pays_for(x, 32)
    assert torch.equal(group_norm(x, 32, weight, bias, EPS), narrow_group_norm(x, 32, weight, bias, EPS))
    assert pays_for(x, 8)
    assert not pays_for(x, 4)  # 8 channels a group
    assert not pays_for(x[:8], 32)  # small
    assert not pays_for(x.reshape(16, 32, 32, 32), 32)  # 1,024 pixels
    ours = reference.group_norm_silu(x, weight, bias, 32, shift=shift)
    theirs = F.silu(F.group_norm((x + shift[:, :, None, None]).double(), 32, weight.double(), bias.double(), EPS))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)


BACKWARD_BEHIND_A_FROZEN_LAYER = """
import torch
from ddpm_fast.ops.cpu_group_norm import group_norm
x = torch.arange(4096.0).view(2, 32, 8, 8).sin().contiguous(memory_format=torch.channels_last)
weight, bias = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
(group_norm(x, 8, weight, bias, 1e-6) * x.cos()).sum().backward()
print(weight.grad.tolist(), bias.grad.tolist(), sep="\\n")
"""


def test_behind_a_frozen_layer_its_backward_pass_comes_back():
    """In a process of its own: PyTorch's ends it by a segmentation fault."""
    command = [sys.executable, "-c", BACKWARD_BEHIND_A_FROZEN_LAYER]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    ours = torch.tensor([[float(number) for number in line[1:-1].split(",")] for line in found.stdout.splitlines()])
    x = torch.arange(4096.0, dtype=torch.float64).view(2, 32, 8, 8).sin()  # as NCHW, where PyTorch's own comes back
    weight, bias = (make(32, dtype=torch.float64).requires_grad_() for make in (torch.ones, torch.zeros))
    gradients = torch.autograd.grad((F.group_norm(x, 8, weight, bias, EPS) * x.cos()).sum(), (weight, bias))
    torch.testing.assert_close(ours.double(), torch.stack(gradients), rtol=1e-3, atol=1e-3)


def test_only_there_it_stands_in_for_pytorchs():
    x, weight, bias = tensors((2, 8, 4, 4), torch.float32)
    assert not ends_pytorch(x, weight, bias)
    weight.requires_grad_()
    assert ends_pytorch(x, weight, bias)
    assert not ends_pytorch(x.clone().requires_grad_(), weight, bias)
    with torch.no_grad():
        assert not ends_pytorch(x, weight, bias)
