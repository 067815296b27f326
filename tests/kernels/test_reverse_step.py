"""kernels/reverse_step.py against the float64 reference."""

import pytest
import torch

from ddpm_fast.config import DiffusionConfig
from ddpm_fast.diffusion.noise import Stream, key_from_seed
from ddpm_fast.diffusion.samplers import Row, sampler_table
from ddpm_fast.ops import reference

pytest.importorskip("triton")
from ddpm_fast.kernels import reverse_step as module
from ddpm_fast.kernels.reverse_step import reverse_step

LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}


def table(device):
    """Return the paper's rows with e and w filled in, so that every term counts; the last has no noise."""
    rows = sampler_table(DiffusionConfig()).rows.clone()
    rows[:, Row._fields.index("e")], rows[:, Row._fields.index("w")] = 0.2, -0.3
    return rows.to(device)


def make(shape, device, dtype=torch.float32, last=False, mean=0.0, spread=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    values = (mean + spread * torch.randn(shape, generator=generator) for _ in range(3))
    x, out, x0 = (value.to(device).to(memory_format=LAYOUTS[last]) for value in values)
    index = torch.tensor([3, 2**32 - 1, 2**33 + 7, 0, 11], device=device)[: shape[0]]
    return x, out.to(dtype), x0, key_from_seed(2**40 + 5, device), index


def derive(x, out, rows, step, x0, key, index, noise_and_error):
    """Return how far the kernel's x and x0 may lie from the truth before they are stored.

    s times the error of its normals, and roundings of half of float32's eps on every term: at most 9 (two coefficients,
    two products, the difference and four sums), on x0's terms 3. The terms' magnitudes are a step's over magnitudes.
    """
    size, estimate, magnitudes = x.double().abs(), x0.double().abs(), rows.abs()
    magnitudes[:, Row._fields.index("q")] *= -1
    options = {"clip": False, "noisy": False, "x0": estimate}
    reference.reverse_step(size, out.double().abs(), magnitudes, step, key, index, **options)
    eps, error = noise_and_error(key, index, int(step) + 1, Stream.SAMPLING, x.shape)
    s = rows[step, Row._fields.index("s")].abs()
    rounding = 2.0**-24
    return (s * error + 9 * rounding * (size + s * eps.abs())).max().item(), 3 * rounding * estimate.max().item()


def compare(shape, device, assert_within, noise_and_error, *, dtype, last, step, clip, noisy, multistep, **values):
    x, out, x0, key, index = make(shape, device, dtype, last, **values)
    rows, at = table(device), torch.tensor([step], device=device)

    def run(op, x, out, rows, x0, model_input):
        op(x, out, rows, at, key, index, clip=clip, noisy=noisy, x0=x0 if multistep else None, model_input=model_input)
        return (x, x0, model_input) if multistep else (x, model_input)

    poisoned = torch.full_like(out, torch.nan)
    found = run(reverse_step, x.clone(), out, rows.float(), x0.clone(), poisoned)
    plain = run(reference.reverse_step, x.clone(), out, rows.float(), x0.clone(), torch.full_like(out, torch.nan))
    truth = run(reference.reverse_step, x.double(), out, rows, x0.double(), torch.zeros_like(x).double())
    of_x, of_x0 = derive(x, out, rows, at, x0, key, index, noise_and_error) if shape[0] else (0.0, 0.0)
    derived = (of_x, of_x0, of_x) if multistep else (of_x, of_x)
    for ours, theirs, true, bound in zip(found, plain, truth, derived, strict=True):
        assert_within(ours, theirs, true, bound)


SHAPES = [(1, 1, 1, 1), (3, 1, 8, 8), (2, 3, 31, 77), (5, 2, 7, 11), (4, 4, 27, 19), (2, 5, 7, 5), (0, 3, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("step", [0, 999])
def test_a_step_equals_the_reference(shape, last, step, device, assert_within, noise_and_error):
    options = {"dtype": torch.float32, "clip": True, "noisy": True, "multistep": True}
    compare(shape, device, assert_within, noise_and_error, last=last, step=step, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("multistep", [False, True])
def test_options_and_dtypes(dtype, clip, noisy, multistep, device, assert_within, noise_and_error):
    options = {"clip": clip, "noisy": noisy, "multistep": multistep}
    compare((2, 3, 5, 7), device, assert_within, noise_and_error, dtype=dtype, last=True, step=400, **options)


def test_any_shape(draw, device, assert_within, noise_and_error):
    shape = tuple(draw.randint(1, most) for most in (3, 9, 12, 12))
    options = {"dtype": torch.float32, "clip": False, "noisy": True, "multistep": True}
    options |= {"last": draw.choice([False, True]), "step": draw.randint(0, 999)}
    compare(shape, device, assert_within, noise_and_error, **options)


@pytest.mark.parametrize("step", [-1, 1000])
def test_a_step_outside_the_table_gives_nan(step, device):
    x, out, _, key, index = make((2, 3, 4, 4), device)
    reverse_step(x, out, table(device).float(), torch.tensor([step], device=device), key, index, clip=True, noisy=True)
    assert x.isnan().all()


def test_a_nan_is_not_clipped_away(device):
    x, out, _, key, index = make((1, 3, 4, 4), device)
    out[0, 1, 2, 3] = torch.nan
    reverse_step(x, out, table(device).float(), torch.tensor([5], device=device), key, index, clip=True, noisy=True)
    assert x.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("channels", [96, 384, 512])
def test_many_channels(channels, device, assert_within, noise_and_error):
    options = {"dtype": torch.float32, "clip": True, "noisy": True, "multistep": True}
    compare((1, channels, 1, 2), device, assert_within, noise_and_error, last=True, step=500, **options)


@pytest.mark.parametrize(("dtype", "mean", "spread"), [(torch.float32, 1e3, 1e-2), (torch.bfloat16, 32.0, 1.0)])
def test_a_large_mean_with_small_variance(dtype, mean, spread, device, assert_within, noise_and_error):
    options = {"dtype": dtype, "last": True, "step": 999, "clip": False, "noisy": True, "multistep": True}
    compare((2, 3, 5, 7), device, assert_within, noise_and_error, mean=mean, spread=spread, **options)


BAD = {
    "x is torch.bfloat16": {"x": torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)},
    "out has strides": {"out": torch.zeros(2, 3, 8, 8).to(memory_format=torch.channels_last)},
    "rows is torch.float64": {"rows": torch.zeros(1000, 8, dtype=torch.float64)},
    "x0 is torch.bfloat16": {"x0": torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)},
    "key is torch.int32": {"key": torch.zeros(2, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message, device):
    x, out, _, key, index = make((2, 3, 8, 8), device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    good = {"x": x, "out": out, "rows": table(device).float(), "step": step, "key": key, "sample_index": index}
    wrong = {name: value.to(device) for name, value in BAD[message].items()}
    with pytest.raises(ValueError, match=message):
        reverse_step(**{**good, **wrong}, clip=True, noisy=True)


def test_columns_are_those_of_the_table():
    for name in "pquvews":
        assert getattr(module, f"COLUMN_{name.upper()}").value == Row._fields.index(name)
    assert module.COLUMNS.value == len(Row._fields)
