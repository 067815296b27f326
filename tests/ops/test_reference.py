"""The ops in plain PyTorch against closed forms, numpy and diffusers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.config import DiffusionConfig, SamplerConfig
from ddpm_fast.diffusion import noise
from ddpm_fast.diffusion.noise import NoiseAddress, Stream, key_from_seed
from ddpm_fast.diffusion.samplers import Row, sampler_table
from ddpm_fast.diffusion.schedule import TrainingTable, training_table
from ddpm_fast.ops import reference
from ddpm_fast.ops.reference import Dropout

PREDICTIONS = ["eps", "x0", "v"]
KEY = key_from_seed(11)
SHAPE = (3, 5, 7)
SAMPLES = torch.arange(100, 109)
T = torch.tensor([0, 1, 10, 100, 300, 500, 700, 998, 999])
ULP = 2.0**-23


def images(dtype: torch.dtype = torch.uint8) -> Tensor:
    whole = torch.randint(0, 256, (9, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return whole if dtype == torch.uint8 else whole.to(dtype) / 127.5 - 1


def table(prediction: str = "eps", gamma: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return training_table(DiffusionConfig(prediction=prediction), gamma, dtype)  # pyright: ignore[reportArgumentType]


def eps64() -> Tensor:
    return noise.normal(NoiseAddress(KEY, SAMPLES), 0, Stream.TRAINING, SHAPE, torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_image(column: Tensor) -> Tensor:
    return column.view(-1, 1, 1, 1)


# ---- q_sample and noise_mse -----------------------------------------------------------------------------------------


def test_q_sample_is_equation_4():
    betas = np.linspace(1e-4, 0.02, 1000)
    bar = per_image(torch.from_numpy(np.cumprod(1 - betas))[T])
    expected = bar.sqrt() * images(torch.float64) + (1 - bar).sqrt() * eps64()
    found = reference.q_sample(images(), T, table(), KEY, SAMPLES, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_black_and_white_are_minus_and_plus_one():
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    still = torch.tensor([[1.0, 0, 0, 1, 1]], dtype=torch.float64)  # a = 1, b = 0: no noise
    x = reference.q_sample(ends, torch.tensor([0, 0]), still, KEY, SAMPLES[:2], dtype=torch.float64)
    assert x.flatten().tolist() == [-1, 1]


def test_uint8_and_floats_give_the_same():
    both = [reference.q_sample(images(d), T, table(), KEY, SAMPLES) for d in (torch.uint8, torch.float64)]
    assert torch.equal(*both)


@pytest.mark.parametrize("flip", [False, True])
def test_float32_is_float64_to_rounding(flip):
    found = reference.q_sample(images(), T, table(dtype=torch.float32), KEY, SAMPLES, flip=flip)
    truth = reference.q_sample(images(), T, table(), KEY, SAMPLES, flip=flip, dtype=torch.float64)
    assert found.dtype == torch.float32
    # The normals are good to r * 8e-7 with r at most 6.8 (test_noise); the rest is three roundings of |x| < 7.
    assert (found - truth).abs().max() <= 6.8 * 8e-7 + 3 * 7 * ULP / 2


def test_q_sample_gives_nhwc_and_takes_any_layout():
    x = reference.q_sample(images(), T, table(), KEY, SAMPLES, flip=True)
    nhwc = images().to(memory_format=torch.channels_last)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, reference.q_sample(nhwc, T, table(), KEY, SAMPLES, flip=True))


def test_q_sample_depends_on_the_example_not_on_its_batch():
    whole = reference.q_sample(images(), T, table(), KEY, SAMPLES, flip=True, dtype=torch.float64)
    for i in range(9):
        one = slice(i, i + 1)
        alone = reference.q_sample(images()[one], T[one], table(), KEY, SAMPLES[one], flip=True, dtype=torch.float64)
        torch.testing.assert_close(alone, whole[one], rtol=0, atol=1e-13)


def test_flip_mirrors_the_images_that_the_address_names_and_not_their_noise():
    flipped = noise.flips(NoiseAddress(KEY, SAMPLES))
    assert 0 < flipped.sum() < 9
    x_start = torch.where(per_image(flipped), images(torch.float64).flip(-1), images(torch.float64))
    expected = reference.q_sample(x_start, T, table(), KEY, SAMPLES, dtype=torch.float64)
    assert torch.equal(reference.q_sample(images(), T, table(), KEY, SAMPLES, flip=True, dtype=torch.float64), expected)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_prediction_has_no_loss_and_gives_the_data_back(prediction, flip):
    flipped = per_image(noise.flips(NoiseAddress(KEY, SAMPLES)) & flip)
    x_start = torch.where(flipped, images(torch.float64).flip(-1), images(torch.float64))
    bar = per_image(torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[T])
    a, b = bar.sqrt(), (1 - bar).sqrt()
    target = {"eps": eps64(), "x0": x_start, "v": a * eps64() - b * x_start}[prediction]
    loss = reference.noise_mse(target, images(), T, table(prediction), KEY, SAMPLES, flip=flip)
    assert loss.shape == (9,)
    assert loss.max() < 1e-24
    x_t = reference.q_sample(images(), T, table(prediction), KEY, SAMPLES, flip=flip, dtype=torch.float64)
    found = {"eps": (x_t - b * target) / a, "x0": target, "v": a * x_t - b * target}[prediction]
    assert ((found - x_start) * a).abs().max() < 1e-13


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_mse_is_the_weighted_mean_square(prediction, gamma):
    out, row = randn(9, *SHAPE), TrainingTable(*table(prediction, gamma)[T].T)
    target = per_image(row.target_eps) * eps64() + per_image(row.target_x_start) * images(torch.float64)
    expected = [m * F.mse_loss(o, y) for m, o, y in zip(row.weight, out, target, strict=True)]
    found = reference.noise_mse(out, images(), T, table(prediction, gamma), KEY, SAMPLES)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-13, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_mse_gradient_is_checked_by_differences(prediction):
    out = randn(9, *SHAPE)[:2, :, :2, :2].clone().requires_grad_()
    fixed = (images()[:2, :, :2, :2], T[3:5], table(prediction, 5.0), KEY, SAMPLES[:2])
    assert torch.autograd.gradcheck(lambda o: reference.noise_mse(o, *fixed, flip=True), (out,))


# ---- group_norm_silu ------------------------------------------------------------------------------------------------


def group_norm_by_numpy(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int, eps: float) -> np.ndarray:
    """Wu and He 2018, in numpy float64."""
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(axis=2, keepdims=True)
    n = (centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + eps)).reshape(x.shape)
    return n * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 8, 3, 5), 4), ((1, 6, 1, 1), 2), ((3, 31, 1, 7), 31), ((0, 4, 2, 2), 2)]
)
def test_group_norm_silu_is_numpys_in_float64(shape, groups, embedding, silu):
    n, c = shape[:2]
    x, weight, bias = randn(*shape) * 3 + 2, randn(c, seed=1), randn(c, seed=2)
    shift = randn(n, c, seed=3) if embedding else None
    found = reference.group_norm_silu(x, weight, bias, groups, shift=shift, silu=silu)
    h = x.numpy() if shift is None else x.numpy() + shift.numpy()[:, :, None, None]
    h = group_norm_by_numpy(h, weight.numpy(), bias.numpy(), groups, 1e-6) if n else h
    expected = h / (1 + np.exp(-h)) if silu else h
    assert found.shape == shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11, atol=1e-11)


def test_group_norm_silu_is_pytorchs_in_float32():
    x, weight, bias = randn(2, 8, 4, 4).float(), randn(8, seed=1).float(), randn(8, seed=2).float()
    expected = F.silu(F.group_norm(x, 4, weight, bias, 1e-6))
    torch.testing.assert_close(reference.group_norm_silu(x, weight, bias, 4), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype):
    x, weight, bias = (randn(2, 8, 4, 4) * 0.1 + 3).to(dtype), randn(8, seed=1).float(), randn(8, seed=2).float()
    found = reference.group_norm_silu(x, weight, bias, 4)
    assert found.dtype == dtype
    assert torch.equal(found, reference.group_norm_silu(x.float(), weight, bias, 4).to(dtype))


def test_group_norm_silu_keeps_the_layout_and_refuses_groups_that_do_not_divide():
    x = randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    y = reference.group_norm_silu(x, randn(8), randn(8), 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, reference.group_norm_silu(x.contiguous(), randn(8), randn(8), 2), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="8 channels do not divide into 3 groups"):
        reference.group_norm_silu(x, randn(8), randn(8), 3)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("embedding", [False, True])
def test_group_norm_silu_gradients_are_checked_by_differences(embedding, probability, silu):
    dropout = Dropout(probability, KEY, torch.tensor([3, 2**32 + 4]), 3)

    def op(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        return reference.group_norm_silu(x, weight, bias, 2, shift=shift, silu=silu, dropout=dropout)

    inputs = randn(2, 4, 1, 3), randn(4, seed=1), randn(4, seed=2), *([randn(2, 4, seed=3)] if embedding else [])
    assert torch.autograd.gradcheck(op, [value.requires_grad_() for value in inputs])


# ---- dropout --------------------------------------------------------------------------------------------------------


def dropped(x: Tensor, probability: float, samples: Tensor, layer: int = 0) -> Tensor:
    one = torch.ones(x.shape[1], dtype=x.dtype)
    return reference.group_norm_silu(x, one, one, 2, dropout=Dropout(probability, KEY, samples, layer))


def test_dropout_keeps_exactly_the_addressed_places_and_scales_them():
    x, samples = randn(3, 6, 5, 7), torch.tensor([4, 9, 2])
    plain = dropped(x, 0.0, samples)
    words = noise.pixel_words(NoiseAddress(KEY, samples), 2, Stream.DROPOUT, (6, 5, 7))
    keep = torch.stack([words[c % 4, :, c // 4] for c in range(6)], 1).view(3, 6, 5, 7) >= int(0.3 * 2**32)
    torch.testing.assert_close(dropped(x, 0.3, samples, 2), torch.where(keep, plain / 0.7, 0.0), rtol=0, atol=1e-14)


def test_dropouts_keep_set_is_the_same_in_any_dtype_layout_and_batch():
    x, samples = randn(3, 6, 5, 7), torch.tensor([4, 9, 2])
    kept = dropped(x, 0.5, samples) != 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dropped(x.to(dtype), 0.5, samples) != 0, kept)
    assert torch.equal(dropped(x.contiguous(memory_format=torch.channels_last), 0.5, samples) != 0, kept)
    assert torch.equal(dropped(x[1:2], 0.5, samples[1:2]) != 0, kept[1:2])
    assert torch.equal(dropped(x.flip(0), 0.5, samples.flip(0)) != 0, kept.flip(0))
    for other in (dropped(x, 0.5, samples + 1), dropped(x, 0.5, samples, layer=1)):
        assert 0.3 < ((other != 0) == kept).double().mean() < 0.7


def test_dropout_preserves_the_mean():
    x = randn(16, 8, 32, 32)
    ratio = dropped(x, 0.25, torch.arange(16)) / dropped(x, 0.0, torch.arange(16))
    assert abs(ratio.mean() - 1) < 5 * math.sqrt(0.25 / 0.75 / ratio.numel())


# ---- timestep_embedding and reverse_step ----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 4, 32, 128])
def test_timestep_embedding_is_the_formula_and_diffusers(dim):
    t = torch.tensor([0, 1, 17, 999])
    half = dim // 2
    angle = t.numpy()[:, None] * np.exp(-np.log(10000) * np.arange(half) / max(half - 1, 1))
    found = reference.timestep_embedding(t, dim, torch.float64)
    np.testing.assert_allclose(found.numpy(), np.concatenate([np.sin(angle), np.cos(angle)], 1), atol=1e-12)
    single = reference.timestep_embedding(t, dim)
    assert single.dtype == torch.float32
    # A frequency is good to 2 ulp of itself (exponent up to 9.2, its rounding doubled by exp), times t = 999.
    assert (single - found).abs().max() <= 999 * 10 * ULP
    if dim > 2:  # theirs divides by half - 1 = 0 there
        diffusers = pytest.importorskip("diffusers.models.embeddings")
        theirs = diffusers.get_timestep_embedding(t, dim, flip_sin_to_cos=False, downscale_freq_shift=1)
        assert (single - theirs).abs().max() <= 999 * 4 * ULP


@pytest.mark.parametrize("clip", [True, False])
def test_reverse_step_is_the_tables_row_written_in_place(clip):
    rows, samples, n = randn(3, 8), torch.tensor([5, 6]), 2
    x, prediction, x0 = randn(n, *SHAPE), randn(n, *SHAPE, seed=1), randn(n, *SHAPE, seed=2)
    row = Row(*rows[1])
    z = noise.normal(NoiseAddress(KEY, samples), 2, Stream.SAMPLING, SHAPE, torch.float64)  # the second update's
    estimate = row.x0_from_x * x - row.x0_from_prediction * prediction
    estimate = estimate.clamp(-1, 1) if clip else estimate
    expected = (
        row.next_from_x0 * estimate
        + row.next_from_x * x
        + row.next_from_prediction * prediction
        + row.next_from_x0_prev * x0
        + row.noise * z
    )
    copy, addresses = torch.full_like(x, math.nan, dtype=torch.bfloat16), (x.data_ptr(), x0.data_ptr())
    unchanged = prediction.clone(), rows.clone()
    step = torch.tensor([1])
    reference.reverse_step(x, prediction, rows, step, KEY, samples, clip=clip, noisy=True, x0=x0, model_input=copy)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(x0, estimate, rtol=0, atol=1e-13)
    assert torch.equal(copy, x.to(torch.bfloat16))
    assert addresses == (x.data_ptr(), x0.data_ptr())
    assert torch.equal(prediction, unchanged[0])
    assert torch.equal(rows, unchanged[1])
    assert step.item() == 1


def test_reverse_step_is_the_same_in_any_layout_and_batch():
    rows = sampler_table(DiffusionConfig(), SamplerConfig(steps=10)).rows
    x, prediction, samples = randn(4, *SHAPE), randn(4, *SHAPE, seed=1), torch.arange(4)

    def after(x: Tensor, part: slice) -> Tensor:
        x, step = x[part].clone(memory_format=torch.preserve_format), torch.tensor([3])
        reference.reverse_step(x, prediction[part], rows, step, KEY, samples[part], clip=True, noisy=True)
        return x

    whole = after(x, slice(None))
    last = after(x.contiguous(memory_format=torch.channels_last), slice(None))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, whole)
    torch.testing.assert_close(torch.cat([after(x, slice(0, 1)), after(x, slice(1, 4))]), whole, rtol=0, atol=1e-13)
