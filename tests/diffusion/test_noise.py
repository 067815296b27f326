"""Addressable noise: the published words, the right distribution, and nothing but the address decides."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ddpm_fast.diffusion import noise
from ddpm_fast.diffusion.noise import NoiseAddress, Stream, key_from_seed, pixel_words, random_flips, random_timesteps
from ddpm_fast.engine.execution import can_compile_for_cpu

MASK = 0xFFFFFFFF
SEED = 0x1234_5678_9ABC_DEF0
SIGMAS = 5.0  # every statistical bound below is this many standard errors; seeds are fixed, so nothing is flaky

# A float32 Box-Muller pair is within r * 8e-7 of float64's, r the radius: the angle 2 pi u2 carries the rounding of
# 2 pi (2.8e-8) and of the product (6.0e-8), times 2 pi = 5.5e-7; logarithm, root, sine and product add 2 ulp, 2.4e-7.
NORMAL_BOUND = 8e-7
LARGEST_RADIUS = math.sqrt(2 * 33 * math.log(2))


def philox_by_hand(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's integers, as in Salmon et al. 2011, Section 3.3."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & MASK, (product0 >> 32) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def address(images: int, first: int = 0, seed: int = SEED) -> NoiseAddress:
    return NoiseAddress(key_from_seed(seed), torch.arange(first, first + images))


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Correlation in standard errors: about normal for independent x and y."""
    return float(torch.corrcoef(torch.stack([x.flatten().double(), y.flatten().double()]))[0, 1] * math.sqrt(x.numel()))


VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK, MASK, MASK, MASK), (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_words(counter, key, expected):
    words = noise.philox(tuple(torch.tensor([c]) for c in counter), torch.tensor(key))  # pyright: ignore[reportArgumentType]
    assert tuple(int(w) for w in words) == expected
    assert philox_by_hand(counter, key) == expected


def test_philox_equals_python_integers_on_random_counters():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, size=(4, 200), dtype=np.int64)
    c0, c1, c2, c3 = (torch.from_numpy(c) for c in counters)
    words = torch.stack(noise.philox((c0, c1, c2, c3), key_from_seed(SEED))).T.tolist()
    key = (SEED & MASK, SEED >> 32)
    assert [tuple(w) for w in words] == [philox_by_hand((a, b, c, d), key) for a, b, c, d in counters.T.tolist()]


def test_key_holds_low_then_high_word_and_refuses_other_seeds():
    assert key_from_seed(SEED).tolist() == [0x9ABCDEF0, 0x12345678]
    assert key_from_seed(2**64 - 1).tolist() == [MASK, MASK]
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=r"outside 0\.\.2\*\*64-1"):
            key_from_seed(seed)


def test_uniforms_are_numpys_bit_for_bit():
    edges = [0, 1, 0x7F, 0x80, 0xFF, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, MASK]
    words = np.concatenate([edges, np.random.default_rng(1).integers(0, 2**32, size=100_000)])
    expected = words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    found = noise.uniform(torch.from_numpy(words))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy().view(np.int32), expected.view(np.int32))
    assert found.min() == 2**-33


def test_highest_128_words_give_exactly_one_and_the_word_below_less():
    words = torch.arange(0xFFFFFF7F, 0x100000000)
    assert noise.uniform(words[1:]).eq(1.0).all()
    assert noise.uniform(words[:1]).item() < 1.0
    r0, r1 = noise.box_muller(words[1:], words[1:])
    assert r0.eq(0).all()
    assert r1.eq(0).all()


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 1797, 50_000, 2**31])
def test_integer_below_never_reaches_n(n):
    words = torch.tensor([0, 0xFFFFFF80, MASK])
    expected = [int(w) * n >> 32 for w in words]
    assert noise.integer_below(words, n).tolist() == expected
    assert expected[2] == n - 1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, NORMAL_BOUND), (torch.float64, 1e-15)])
def test_normals_equal_an_independent_float64_box_muller(dtype, bound):
    words = torch.from_numpy(np.random.default_rng(2).integers(0, 2**32, size=(2, 100_000)))
    words[:, :3] = torch.tensor([[0, MASK, 0], [0, 0, MASK]])
    u1, u2 = (words.numpy().astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u1))
    # float64 needs 4 ulp (2.2e-16 each) of the angle, up to 2 pi, as well as of the radius.
    scale = radius * (bound if dtype == torch.float32 else 8 * bound) + 1e-300
    for found, wave in zip(noise.box_muller(words[0], words[1], dtype), (np.cos, np.sin), strict=True):
        assert found.dtype == dtype
        assert (np.abs(found.double().numpy() - radius * wave(2 * np.pi * u2)) <= scale).all()


def test_a_million_normals_are_standard_normal():
    draws = noise.normal(address(245), 0, Stream.TRAINING, (4, 32, 32)).flatten().double().numpy()
    n = draws.size
    assert n > 1_000_000
    assert abs(draws.mean()) < SIGMAS * math.sqrt(1 / n)
    assert abs(draws.var() - 1) < SIGMAS * math.sqrt(2 / n)
    assert abs((draws**3).mean()) < SIGMAS * math.sqrt(15 / n)
    assert abs((draws**4).mean() - 3) < SIGMAS * math.sqrt(96 / n)
    assert stats.kstest(draws, "norm").pvalue > 1e-3


def test_noise_is_independent_over_pixels_channels_and_samples():
    draws = noise.normal(address(64), 3, Stream.SAMPLING, (8, 16, 16))
    for dim in range(4):
        for lag in (1, 2, 4):
            x, y = draws.narrow(dim, 0, draws.shape[dim] - lag), draws.narrow(dim, lag, draws.shape[dim] - lag)
            assert abs(correlation(x, y)) < SIGMAS, (dim, lag)
            assert abs(correlation(x.square(), y.square())) < SIGMAS, (dim, lag)


def test_noise_is_independent_over_steps_streams_and_seeds():
    shape = (4, 16, 16)
    first = noise.normal(address(64), 3, Stream.SAMPLING, shape)
    others = [noise.normal(address(64), step, Stream.SAMPLING, shape) for step in (0, 1, 2, 4)]
    others += [noise.normal(address(64), 3, stream, shape) for stream in Stream if stream != Stream.SAMPLING]
    others += [noise.normal(address(64, seed=seed), 3, Stream.SAMPLING, shape) for seed in (SEED + 1, SEED ^ 1 << 32)]
    for other in others:
        assert abs(correlation(first, other)) < SIGMAS
        assert abs(correlation(first.square(), other.square())) < SIGMAS


@pytest.mark.parametrize("stream", list(Stream))
def test_words_lie_at_the_designs_address(stream):
    tags = ["TRAINING", "SAMPLING", "TIMESTEP", "FLIP", "DATA_ORDER", "DROPOUT", "LABEL"]
    channels, height, width, step = 6, 3, 5, 9
    samples = torch.tensor([0, 7, 2**32 - 1])
    where = NoiseAddress(key_from_seed(SEED), samples)
    found = noise.pixel_words(where, step, stream, (channels, height, width))
    assert found.shape == (4, 3, 2, height * width)
    for n, sample in enumerate(samples.tolist()):
        for c, h, w in [(0, 0, 0), (3, 1, 2), (4, 2, 4), (5, 0, 3)]:
            counter = (h * width + w, sample, step, tags.index(stream.name) + 256 * (c // 4))
            expected = philox_by_hand(counter, (SEED & MASK, SEED >> 32))
            assert found[:, n, c // 4, h * width + w].tolist() == list(expected)


def test_channels_of_a_pixel_are_its_four_words_as_two_pairs():
    draws = noise.normal(address(2, first=17), 5, Stream.SAMPLING, (6, 3, 4), torch.float64)
    for n, c, h, w in [(0, 0, 0, 0), (0, 1, 2, 3), (1, 2, 1, 0), (1, 3, 2, 2), (0, 4, 1, 1), (1, 5, 0, 2)]:
        words = philox_by_hand((h * 4 + w, 17 + n, 5, 1 + 256 * (c // 4)), (SEED & MASK, SEED >> 32))
        pair = words[:2] if c % 4 < 2 else words[2:]
        u1, u2 = (float(np.float32(v) * np.float32(2**-32) + np.float32(2**-33)) for v in pair)
        wave = math.sin if c % 2 else math.cos
        assert draws[n, c, h, w].item() == pytest.approx(
            math.sqrt(-2 * math.log(u1)) * wave(2 * math.pi * u2), abs=1e-13
        )


def test_step_may_be_a_device_tensor():
    found = noise.normal(address(3), torch.tensor([4]), Stream.SAMPLING, (3, 2, 2))
    assert torch.equal(found, noise.normal(address(3), 4, Stream.SAMPLING, (3, 2, 2)))


@pytest.mark.parametrize("parts", [[1, 10], [5, 6], [1] * 11, [0, 11]])
def test_noise_is_the_same_at_any_batch_split(parts):
    shape = (3, 7, 5)
    words = noise.pixel_words(address(11), 2, Stream.SAMPLING, shape)
    draws = noise.normal(address(11), 2, Stream.SAMPLING, shape)
    starts = [sum(parts[:i]) for i in range(len(parts))]
    split = [address(count, first) for count, first in zip(parts, starts, strict=True)]
    assert torch.equal(torch.cat([noise.pixel_words(a, 2, Stream.SAMPLING, shape) for a in split], 1), words)
    rounding = 2 * NORMAL_BOUND * LARGEST_RADIUS
    joined = torch.cat([noise.normal(a, 2, Stream.SAMPLING, shape) for a in split])
    assert (joined - draws).abs().max() <= rounding


def test_a_smaller_channel_count_is_the_start_of_a_larger_one():
    whole = noise.pixel_words(address(2), 0, Stream.TRAINING, (9, 2, 2))
    for channels in range(1, 9):
        part = noise.pixel_words(address(2), 0, Stream.TRAINING, (channels, 2, 2))
        assert torch.equal(part, whole[:, :, : (channels + 3) // 4])
        assert noise.normal(address(2), 0, Stream.TRAINING, (channels, 2, 2)).shape == (2, channels, 2, 2)


def test_timesteps_are_the_first_word_scaled_and_uniform():
    where, total, n = address(100_000), 1000, 100_000
    found = noise.random_timesteps(where, total)
    for i in (0, 1, 99_999):
        assert found[i] == philox_by_hand((0, i, 0, 2), (SEED & MASK, SEED >> 32))[0] * total >> 32
    counts = torch.bincount(found, minlength=total)
    assert counts.shape == (total,)
    assert 1e-3 < stats.chi2.sf(float(((counts - n / total) ** 2).sum() / (n / total)), total - 1) < 1 - 1e-3


def test_timesteps_are_drawn_as_often_as_their_thresholds_say():
    thresholds = torch.tensor([2**30, 2**31, 2**31])  # a quarter, a quarter, never, half
    where, words = address(100_000), noise.random_timesteps(address(100_000), 2**31) * 2
    found = noise.random_timesteps(where, 4, thresholds)
    assert torch.equal(found, (words[:, None] >= thresholds).sum(1))
    counts = torch.bincount(found, minlength=4).double() / 100_000
    assert counts.tolist() == pytest.approx([0.25, 0.25, 0, 0.5], abs=SIGMAS * 0.5 / math.sqrt(100_000))


def test_flips_are_the_first_words_top_bit_and_half():
    found = noise.random_flips(address(100_000))
    assert found.dtype == torch.bool
    for i in range(20):
        assert found[i].item() == (philox_by_hand((0, i, 0, 3), (SEED & MASK, SEED >> 32))[0] >= 2**31)
    assert abs(found.double().mean().item() - 0.5) < SIGMAS * 0.5 / math.sqrt(100_000)
    assert abs(correlation(found[1:], found[:-1])) < SIGMAS
    assert abs(correlation(found, noise.random_timesteps(address(100_000), 1000))) < SIGMAS


@pytest.mark.parametrize("n", [1, 2, 64, 1797])
def test_data_order_is_a_permutation(n):
    for epoch in (0, 1, 10_000):
        order = noise.permutation(key_from_seed(SEED), epoch, n)
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(n))


def test_data_order_differs_by_epoch_and_seed_and_repeats_otherwise():
    first = noise.permutation(key_from_seed(1), 0, 1797)
    assert torch.equal(first, noise.permutation(key_from_seed(1), 0, 1797))
    for other in (noise.permutation(key_from_seed(1), 1, 1797), noise.permutation(key_from_seed(2), 0, 1797)):
        # A random permutation keeps one place on average, and eight with a chance of 1e-6.
        assert (first == other).sum() < 8
        assert abs(correlation(first, other)) < SIGMAS


def test_every_order_of_three_examples_is_equally_likely():
    orders = [tuple(noise.permutation(key_from_seed(3), epoch, 3).tolist()) for epoch in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_words_below_happen_with_the_thresholds_probability(probability):
    threshold, shape = int(probability * 2**32), (4, 32, 32)
    dropped = noise.random_words_below(address(32), 7, Stream.DROPOUT, shape, threshold)
    se = math.sqrt(probability * (1 - probability) / dropped.numel())
    assert abs(dropped.double().mean().item() - probability) <= SIGMAS * se
    word = philox_by_hand((33, 5, 7, 5), (SEED & MASK, SEED >> 32))
    assert dropped[5, :, 1, 1].tolist() == [w < threshold for w in word]


@pytest.mark.skipif(not can_compile_for_cpu(), reason="PyTorch has nothing to compile for a CPU with")
@pytest.mark.parametrize("images", [1, *(pytest.param(images, marks=pytest.mark.slow) for images in (4, 9))])
def test_compiled_code_makes_the_same_words(images):
    """C++ leaves an int64 that wraps undefined: GCC made other words of it, one image at a time."""

    def words(key: Tensor, sample_index: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        address = NoiseAddress(key, sample_index)
        drawn = (
            random_timesteps(address, 1000),
            random_flips(address),
            pixel_words(address, 0, Stream.TRAINING, (3, 5, 7)),
        )
        return *drawn, pixel_words(address, step, Stream.SAMPLING, (1, 3, 3))

    arguments = key_from_seed(2**63 + 12345), torch.arange(images) + 7, torch.tensor([5])
    compiled = torch.compile(words, dynamic=False, fullgraph=True)(*arguments)
    assert all(torch.equal(ours, eager) for ours, eager in zip(compiled, words(*arguments), strict=True))
