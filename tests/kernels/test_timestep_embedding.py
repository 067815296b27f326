"""kernels/timestep_embedding.py against the float64 reference."""

import pytest
import torch

from ddpm_fast.ops import reference

pytest.importorskip("triton")
from ddpm_fast.kernels.timestep_embedding import timestep_embedding


@pytest.mark.parametrize("dim", [2, 4, 32, 62, 128])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32], ids=str)
def test_angles_up_to_1000_are_right_to_float32_rounding(dim, dtype, device):
    t = torch.tensor([0, 1, 2, 77, 499, 998, 999, 1000], device=device).to(dtype)
    truth = reference.timestep_embedding(t, dim, torch.float64)
    assert (timestep_embedding(t, dim) - truth).abs().max() <= 2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_by_the_common_rule(dtype, device, assert_within):
    t = torch.arange(0, 1000, 37, device=device)
    plain = reference.timestep_embedding(t, 32).to(dtype)
    assert_within(timestep_embedding(t, 32, dtype), plain, reference.timestep_embedding(t, 32, torch.float64))


def test_no_timesteps_and_a_whole_table(device):
    assert timestep_embedding(torch.empty(0, dtype=torch.int64, device=device), 32).shape == (0, 32)
    t = torch.arange(999, -1, -1, device=device)
    truth = reference.timestep_embedding(t, 128, torch.float64)
    assert (timestep_embedding(t, 128) - truth).abs().max() <= 2e-7


def test_fractional_and_negative_timesteps(device):
    t = torch.tensor([0.5, 333.25, -7.5], device=device)
    truth = reference.timestep_embedding(t, 64, torch.float64)
    assert (timestep_embedding(t, 64) - truth).abs().max() <= 2e-7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, dtype=torch.float64), 8), "t is torch.float64"),
        ((torch.zeros(2, dtype=torch.int64), 7), "dim is 7"),
        ((torch.zeros(2, dtype=torch.int64), 0), "dim is 0"),
        ((torch.zeros(2, dtype=torch.int64), 8, torch.float64), "dtype is torch.float64"),
    ],
)
def test_bad_input_is_named(arguments, message, device):
    t, *rest = arguments
    with pytest.raises(ValueError, match=message):
        timestep_embedding(t.to(device), *rest)
