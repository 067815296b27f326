"""The gradients that kernels are held to are the reference's: checked by differences with every option at once.

tests/ops/test_reference.py checks them option by option.
"""

import pytest
import torch
from torch import Tensor

from ddpm_fast.config import DiffusionConfig
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.ops import reference


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_silu(silu: bool) -> None:
    dropout = reference.Dropout(0.3, key_from_seed(5), torch.tensor([3, 2**32 + 4]), 2)

    def op(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale_shift: Tensor) -> Tensor:
        return reference.group_norm_silu(
            x, weight, bias, 2, shift=shift, scale_shift=scale_shift, silu=silu, dropout=dropout
        )

    shapes = ((2, 4, 1, 2), (4,), (4,), (2, 4), (2, 8))
    assert torch.autograd.gradcheck(op, [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)])


def test_noise_mse() -> None:
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 3, 2, 2)
    table = training_table(DiffusionConfig(prediction="v"), 5.0, torch.float64)
    fixed = (images, torch.tensor([3, 700]), table, key_from_seed(5), torch.tensor([3, 2**32 + 4]), True)
    assert torch.autograd.gradcheck(lambda out: reference.noise_mse(out, *fixed), (randn(2, 3, 2, 2, seed=0),))
