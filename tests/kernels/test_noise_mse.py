"""kernels/noise_mse.py, forward and backward, against the float64 reference."""

from typing import Any

import pytest
import torch

from ddpm_fast.config import DiffusionConfig
from ddpm_fast.constants import TrainingTable
from ddpm_fast.diffusion.noise import Stream, key_from_seed
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.ops import reference

pytest.importorskip("triton")
from ddpm_fast.kernels import noise_mse as module
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_backward

# v-prediction and min-SNR: all that the loss reads of the table matters.
TABLE = training_table(DiffusionConfig(prediction="v"), 5.0, torch.float64)


def make(shape, device, dtype=torch.float32, mean=0.0, spread=1.0):
    N = shape[0]
    generator = torch.Generator().manual_seed(sum(shape))
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    prediction = (mean + spread * torch.randn(shape, generator=generator)).to(dtype)
    prediction, images = (value.to(device).to(memory_format=torch.channels_last) for value in (prediction, images))
    t = torch.tensor([0, 999, 500, 1, 250], device=device)[:N]
    index = torch.tensor([3, 2**32 - 1, 2**33 + 7, 0, 11], device=device)[:N]
    key = key_from_seed(2**40 + 5, device)
    return prediction, images, t, key, index


def derive(prediction, images, t, table, key, index, flip, noise_and_error):
    """Return how far the kernel's loss [N] and gradient [N, C, H, W] may lie from the truth, for a grad of 1.

    To first order in u = 2**-24, half of float32's eps. With c and d for target_eps and target_x_start, a difference
    D = prediction - (c*eps + d*x_start) is off by
        delta = |c|*E + u*(3*|c*eps| + 5*|d*x_start| + |D|)
    where E is the error of the kernel's normals; c, its product and the sum are rounded; so are d, its product and the
    sum, and 1/127.5 and its product; and so is the difference. A square is off by 2*|D|*delta + u*D^2. In the sum over
    tiles no number passes more than 64 additions at these shapes, 16 of a thread at most, the rest over threads and
    tiles. The weight, the number of elements, the quotient (2 ulp on a GPU) and the product cost 8 roundings.
    """
    u = 2.0**-24
    _, _, c, d, weight = (column.view(-1, 1, 1, 1) for column in TrainingTable(*table[t].unbind(1)))
    unchanged = torch.tensor([TrainingTable(1.0, 0, 0, 0, 0)], dtype=torch.float64, device=t.device)
    options = {"flip": flip, "dtype": torch.float64}
    x_start = reference.q_sample(images, torch.zeros_like(t), unchanged, key, index, **options)
    eps, error = noise_and_error(key, index, 0, Stream.TRAINING, images.shape)
    difference = prediction.double() - (c * eps + d * x_start)
    delta = c.abs() * error + u * (3 * (c * eps).abs() + 5 * (d * x_start).abs() + difference.abs())
    squares = 2 * difference.abs() * delta + (1 + 64 + 8) * u * difference.square()
    loss = weight.flatten() * squares.mean((1, 2, 3))
    return loss, 2 * weight * (delta + 8 * u * difference.abs()) / images[:1].numel()


def compare(shape, device, assert_within, noise_and_error, flip=True, **values):
    prediction, images, t, key, index = make(shape, device, **values)
    table = TABLE.to(device)
    grad = torch.linspace(-1, 2, shape[0], device=device)
    found = noise_mse(prediction, images, t, table.float(), key, index, flip=flip)
    gradient = noise_mse_backward(grad, prediction, images, t, table.float(), key, index, flip=flip)
    leaves = prediction.detach().clone().requires_grad_(), prediction.double().requires_grad_()
    plain = reference.noise_mse(leaves[0], images, t, table.float(), key, index, flip=flip)
    truth = reference.noise_mse(leaves[1], images, t, table, key, index, flip=flip)
    (plain_gradient,) = torch.autograd.grad(plain, leaves[0], grad)
    (true_gradient,) = torch.autograd.grad(truth, leaves[1], grad.double())
    bound, gradient_bound = derive(prediction, images, t, table, key, index, flip, noise_and_error)
    assert ((found.double() - truth).abs() <= bound).all()
    assert found.dtype == torch.float32
    largest = (grad.view(-1, 1, 1, 1) * gradient_bound).abs().max().item() if shape[0] else 0.0
    assert_within(gradient, plain_gradient, true_gradient, largest)
    assert gradient.stride() == prediction.stride()


SHAPES = [(1, 1, 1, 1), (3, 1, 8, 8), (2, 3, 31, 77), (2, 4, 27, 19), (4, 1, 3, 3), (0, 3, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_equal_the_reference(shape, device, assert_within, noise_and_error):
    compare(shape, device, assert_within, noise_and_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_dtypes_and_flips(dtype, flip, device, assert_within, noise_and_error):
    compare((5, 3, 5, 7), device, assert_within, noise_and_error, flip, dtype=dtype)


def test_any_shape(draw, device, assert_within, noise_and_error):
    shape = tuple(draw.randint(1, most) for most in (3, 4, 12, 12))
    compare(shape, device, assert_within, noise_and_error, draw.choice([False, True]))


@pytest.mark.parametrize("tiles", [1, 255, 256, 257, 600])
def test_the_mean_is_taken_over_all_tiles(tiles, device):
    """An image of 512 x 512 in colour has 512 of them: here their sums are made up."""
    sums = torch.rand(2, tiles, generator=torch.Generator().manual_seed(tiles)).to(device)
    t, loss = torch.tensor([1, 0], device=device), torch.full((2,), torch.nan, device=device)
    table = torch.tensor([TrainingTable(0, 0, 0, 0, weight) for weight in (0.5, 3.0)], device=device)
    tensors: dict[str, Any] = {"loss_ptr": loss, "partial_ptr": sums, "t_ptr": t, "table_ptr": table}
    module.noise_mse_mean_kernel[(2,)](**tensors, **{"elements": 7, "T": 2, "tiles": tiles, "num_warps": 1})
    expected = torch.tensor([3.0, 0.5], device=device) * sums.double().sum(1) / 7
    torch.testing.assert_close(loss.double(), expected, rtol=16 * 2.0**-24, atol=0)


def test_a_t_outside_the_table_gives_nan(device):
    prediction, images, _, key, index = make((2, 3, 4, 4), device)
    t = torch.tensor([-1, 1000], device=device)
    assert noise_mse(prediction, images, t, TABLE.float().to(device), key, index).isnan().all()


@pytest.mark.parametrize(("dtype", "mean", "spread"), [(torch.float32, 1e3, 1e-2), (torch.bfloat16, 32.0, 1.0)])
def test_a_large_mean_with_small_variance(dtype, mean, spread, device, assert_within, noise_and_error):
    options = {"dtype": dtype, "mean": mean, "spread": spread}
    compare((2, 3, 5, 7), device, assert_within, noise_and_error, False, **options)


BAD = {
    "prediction is torch.float64": {"prediction": torch.zeros(2, 3, 8, 8, dtype=torch.float64)},
    "images is torch.int32": {"images": torch.zeros(2, 3, 8, 8, dtype=torch.int32)},
    "t is torch.int32": {"t": torch.zeros(2, dtype=torch.int32)},
    "table is torch.float64": {"table": TABLE},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message, device):
    prediction, images, t, key, index = make((2, 3, 8, 8), device)
    good = {"prediction": prediction, "images": images, "t": t, "table": TABLE.float().to(device)}
    wrong = {name: value.to(device) for name, value in BAD[message].items()}
    arguments = {"grad": torch.ones(2, device=device), **good, "key": key, "sample_index": index, **wrong}
    with pytest.raises(ValueError, match=message):
        noise_mse_backward(**arguments, flip=False)
