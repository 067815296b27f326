"""kernels/reverse_step.py against the float64 reference."""

from typing import Any

import pytest
import torch

from ddpm_fast.config import DiffusionConfig
from ddpm_fast.constants import SAMPLER_COLUMN
from ddpm_fast.diffusion.noise import Stream, key_from_seed
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.ops import reference

pytest.importorskip("triton")
from ddpm_fast.kernels.reverse_step import reverse_step

ALONE: dict[str, Any] = {"x0": None, "model_input": None, "clip": True, "noisy": True}


def table(device):
    """Return the paper's rows with the other samplers' columns filled in, so that every term counts.

    The last has no noise.
    """
    rows = sampler_table(DiffusionConfig()).rows.clone()
    rows[:, SAMPLER_COLUMN.next_from_prediction], rows[:, SAMPLER_COLUMN.next_from_x0_prev] = 0.2, -0.3
    return rows.to(device)


def make(shape, device, dtype=torch.float32, mean=0.0, spread=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    values = (mean + spread * torch.randn(shape, generator=generator) for _ in range(3))
    x, prediction, x0 = (value.to(device).to(memory_format=torch.channels_last) for value in values)
    index = torch.tensor([3, 2**32 - 1, 2**33 + 7, 0, 11], device=device)[: shape[0]]
    return x, prediction.to(dtype), x0, key_from_seed(2**40 + 5, device), index


def derive(x, prediction, rows, step, x0, key, index, noise_and_error):
    """Return how far the kernel's x and x0 may lie from the truth before they are stored.

    The noise's coefficient times the error of the normals, and roundings of half of float32's eps on every term: at
    most 9 (two coefficients, two products, the difference and four sums), on x0's terms 3. The terms' magnitudes are a
    step's over magnitudes.
    """
    size, estimate, magnitudes = x.double().abs(), x0.double().abs(), rows.abs()
    magnitudes[:, SAMPLER_COLUMN.x0_from_prediction] *= -1
    options = {"clip": False, "noisy": False, "x0": estimate}
    reference.reverse_step(size, prediction.double().abs(), magnitudes, step, key, index, **options)
    eps, error = noise_and_error(key, index, int(step) + 1, Stream.SAMPLING, x.shape)
    s = rows[step, SAMPLER_COLUMN.noise].abs()
    rounding = 2.0**-24
    return (s * error + 9 * rounding * (size + s * eps.abs())).max().item(), 3 * rounding * estimate.max().item()


def compare(shape, device, assert_within, noise_and_error, *, step, clip=True, noisy=True, multistep=True, **values):
    x, prediction, x0, key, index = make(shape, device, **values)
    rows, at = table(device), torch.tensor([step], device=device)

    def run(op, x, rows, x0, model_input):
        outputs = {"x0": x0 if multistep else None, "model_input": model_input}
        op(x, prediction, rows, at, key, index, **outputs, clip=clip, noisy=noisy)
        return (x, x0, model_input) if multistep else (x, model_input)

    poisoned = torch.full_like(prediction, torch.nan)
    found = run(reverse_step, x.clone(), rows.float(), x0.clone(), poisoned)
    plain = run(reference.reverse_step, x.clone(), rows.float(), x0.clone(), torch.full_like(prediction, torch.nan))
    truth = run(reference.reverse_step, x.double(), rows, x0.double(), torch.zeros_like(x).double())
    of_x, of_x0 = derive(x, prediction, rows, at, x0, key, index, noise_and_error) if shape[0] else (0.0, 0.0)
    derived = (of_x, of_x0, of_x) if multistep else (of_x, of_x)
    for ours, theirs, true, bound in zip(found, plain, truth, derived, strict=True):
        assert_within(ours, theirs, true, bound)


SHAPES = [(1, 1, 1, 1), (3, 1, 8, 8), (2, 3, 31, 77), (5, 2, 7, 11), (4, 4, 27, 19), (0, 3, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", [0, 999])
def test_a_step_equals_the_reference(shape, step, device, assert_within, noise_and_error):
    compare(shape, device, assert_within, noise_and_error, step=step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("multistep", [False, True])
def test_options_and_dtypes(dtype, clip, noisy, multistep, device, assert_within, noise_and_error):
    options = {"clip": clip, "noisy": noisy, "multistep": multistep}
    compare((2, 3, 5, 7), device, assert_within, noise_and_error, dtype=dtype, step=400, **options)


def test_any_shape(draw, device, assert_within, noise_and_error):
    shape = tuple(draw.randint(1, most) for most in (3, 4, 12, 12))
    compare(shape, device, assert_within, noise_and_error, step=draw.randint(0, 999), clip=False)


@pytest.mark.parametrize("step", [-1, 1000])
def test_a_step_outside_the_table_gives_nan(step, device):
    x, prediction, _, key, index = make((2, 3, 4, 4), device)
    reverse_step(x, prediction, table(device).float(), torch.tensor([step], device=device), key, index, **ALONE)
    assert x.isnan().all()


def test_a_nan_is_not_clipped_away(device):
    x, prediction, _, key, index = make((1, 3, 4, 4), device)
    prediction[0, 1, 2, 3] = torch.nan
    reverse_step(x, prediction, table(device).float(), torch.tensor([5], device=device), key, index, **ALONE)
    assert x.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("dtype", "mean", "spread"), [(torch.float32, 1e3, 1e-2), (torch.bfloat16, 32.0, 1.0)])
def test_a_large_mean_with_small_variance(dtype, mean, spread, device, assert_within, noise_and_error):
    options = {"dtype": dtype, "mean": mean, "spread": spread}
    compare((2, 3, 5, 7), device, assert_within, noise_and_error, step=999, clip=False, **options)


BAD = {
    "x is torch.bfloat16": {"x": torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)},
    "prediction has strides": {"prediction": torch.zeros(2, 3, 8, 8)},
    "x has shape .* at most 4 channels": {"x": torch.zeros(2, 5, 8, 8)},
    "rows is torch.float64": {"rows": torch.zeros(1000, 8, dtype=torch.float64)},
    "x0 is torch.bfloat16": {"x0": torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)},
    "key is torch.int32": {"key": torch.zeros(2, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message, device):
    x, prediction, _, key, index = make((2, 3, 8, 8), device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    good = {
        "x": x,
        "prediction": prediction,
        "rows": table(device).float(),
        "step": step,
        "key": key,
        "sample_index": index,
    }
    wrong = {name: value.to(device) for name, value in BAD[message].items()}
    with pytest.raises(ValueError, match=message):
        reverse_step(**{**ALONE, **good, **wrong})
