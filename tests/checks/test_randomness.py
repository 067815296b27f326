"""Each fault planted into what is random is named by the right stage and file."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_fast.checks import chance, randomness
from ddpm_fast.checks.randomness import check_randomness
from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.constants import Stream
from ddpm_fast.diffusion import noise
from ddpm_fast.engine import buffers, sampling, trainer
from ddpm_fast.model import unet
from ddpm_fast.ops import REFERENCE, reference
from tests.checks.planting import list_of_faults

CPU = torch.device("cpu")
UNET = UNetConfig(3, 6, 10, 4, (1,), res_blocks=1, attention_resolutions=(), groups=2)
CONFIG = Config("digits", UNET, DiffusionConfig(50, "cosine"), DataConfig(flip=True), TrainingConfig(batch_size=16))
PIXELS = np.random.default_rng(0).integers(0, 256, (150, 6, 10, 3), dtype=np.uint8)
NOISE, OPS, BATCHES = "diffusion/noise.py", "ops/reference.py", "data/batches.py"
TRAINER, LOOP, MODEL = "engine/trainer.py", "engine/sampling.py", "model/unet.py"
FAULTS, fault = list_of_faults()


@pytest.fixture(autouse=True)
def fewer_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw enough for these faults, four times as fast."""
    monkeypatch.setitem(randomness.PIXELS, False, 2**12)


def everything(config: Config = CONFIG) -> Iterator[CheckResult]:
    yield from check_randomness(config, CPU)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, data=DataConfig(), training=TrainingConfig(batch_size=1, seed=2**64 - 1)),
        replace(CONFIG, diffusion=DiffusionConfig(1, "cosine"), training=TrainingConfig(seed=2**32)),
    ],
)
def test_sound_draws_pass(config):
    assert [result for result in everything(config) if not result.passed] == []


def with_normal(monkeypatch: pytest.MonkeyPatch, normal: Callable[..., Any], *modules: Any) -> None:
    for module in modules or (reference, buffers):
        monkeypatch.setattr(module, "normal", normal)


def of_address(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """Draw all noise at another address: change takes and returns (address, step, stream)."""
    normal = noise.normal
    with_normal(monkeypatch, lambda address, step, stream, *rest: normal(*change(address, step, stream), *rest))


@fault("noise", NOISE)
def uniform_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def rand(words0, words1, dtype=torch.float32):  # rand typed for randn, scaled to variance 1
        return tuple(((noise.uniform(w) - 0.5) * 12**0.5).to(dtype) for w in (words0, words1))

    monkeypatch.setattr(noise, "box_muller", rand)


@fault("noise", NOISE)
def philox_in_nine_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "ROUNDS", 9)


@fault("noise", NOISE)
def noise_of_one_row_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = noise.normal
    with_normal(monkeypatch, lambda *given: normal(*given)[..., :1].expand(-1, -1, -1, given[3][2]))


@fault("noise", NOISE)
def noise_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    of_address(monkeypatch, lambda a, *rest: (a._replace(sample_index=torch.zeros_like(a.sample_index)), *rest))


@fault("noise", NOISE)
def noise_of_every_16th_image(monkeypatch: pytest.MonkeyPatch) -> None:
    of_address(monkeypatch, lambda a, *rest: (a._replace(sample_index=a.sample_index % 16), *rest))


@fault("noise", NOISE)
def noise_of_one_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = noise.normal
    with_normal(monkeypatch, lambda *given: normal(*given)[:, :1].expand(-1, given[3][0], -1, -1))


@fault("noise", NOISE)
def seed_ignored_by_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    of_address(monkeypatch, lambda a, *rest: (a._replace(key=torch.zeros_like(a.key)), *rest))


@fault("noise", LOOP)
def noise_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    of_address(monkeypatch, lambda a, step, stream: (a, step * 0 + 1, stream))


@fault("noise", LOOP)
def start_for_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    of_address(monkeypatch, lambda a, step, stream: (a, step * 0 if stream == Stream.SAMPLING else step, stream))


@fault("noise", LOOP)
def noise_of_training_in_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    of_address(monkeypatch, lambda a, step, stream: (a, step, Stream.TRAINING))


@fault("noise", LOOP)
def start_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = noise.normal
    with_normal(monkeypatch, lambda *given: 1.1 * normal(*given), buffers)


@fault("noise", OPS)
def noise_of_steps_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = noise.normal
    shift = 0.1 * torch.ones(())
    with_normal(monkeypatch, lambda a, n, s, *rest: normal(a, n, s, *rest) + shift * (s == Stream.SAMPLING), reference)


@fault("noise", NOISE)
def noise_that_changes_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with_normal(monkeypatch, lambda a, step, stream, shape, *rest: torch.randn(len(a.sample_index), *shape))


@fault("noise", NOISE)
def noise_that_follows_t(monkeypatch: pytest.MonkeyPatch) -> None:
    word = noise.example_word

    def of_training(address, stream):  # t from the very word that makes the first pixel's noise
        return word(address, Stream.TRAINING if stream == Stream.TIMESTEP else stream)

    monkeypatch.setattr(noise, "example_word", of_training)


@fault("noise", NOISE)
def noise_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    order = noise._channels_first
    monkeypatch.setattr(noise, "_channels_first", lambda words, shape: order(words, (shape[0], shape[2], shape[1])))


@fault("noise", NOISE)
def examples_16_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = noise.pixel_words
    monkeypatch.setattr(
        noise, "pixel_words", lambda a, *rest: draw(a._replace(sample_index=a.sample_index & 0xFFFF), *rest)
    )


@fault("noise", OPS)
def other_noise_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = reference.noise_mse

    def other(prediction, images, t, table, key, sample_index, **options):
        return loss(prediction, images, t, table, key, sample_index + 1, **options)

    monkeypatch.setattr(unet, "REFERENCE", replace(REFERENCE, noise_mse=other))
    monkeypatch.setattr(trainer, "choose_ops", lambda *given: replace(REFERENCE, noise_mse=other))


@fault("timesteps", NOISE)
def t_without_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    below = noise.integer_below
    monkeypatch.setattr(noise, "integer_below", lambda words, n: below(words, n - 1))


@fault("timesteps", NOISE)
def t_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    below = noise.integer_below
    monkeypatch.setattr(noise, "integer_below", lambda words, n: below(words, n) + 1)


@fault("timesteps", NOISE)
def t_drawn_towards_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "integer_below", lambda words, n: ((words / 2**32) ** 1.2 * n).long())


@fault("timesteps", NOISE)
def t_equal_within_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = trainer.random_timesteps
    monkeypatch.setattr(
        trainer, "random_timesteps", lambda a, *rest: draw(a._replace(sample_index=a.sample_index // 16), *rest)
    )


@fault("timesteps", NOISE)
def seed_ignored_by_t(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = trainer.random_timesteps
    monkeypatch.setattr(
        trainer, "random_timesteps", lambda a, *rest: draw(a._replace(key=torch.ones_like(a.key)), *rest)
    )


@fault("timesteps", NOISE)
def seeds_high_word_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    key = noise.key_from_seed
    for module in (trainer, sampling):
        monkeypatch.setattr(module, "key_from_seed", lambda seed, device="cpu": key(seed & noise.MASK, device))


@fault("flip", NOISE)
def flips_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        reference, "random_flips", lambda address: torch.zeros_like(address.sample_index, dtype=torch.bool)
    )


@fault("flip", NOISE)
def flips_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        reference, "random_flips", lambda address: torch.ones_like(address.sample_index, dtype=torch.bool)
    )


@fault("flip", NOISE)
def flips_every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "random_flips", lambda address: address.sample_index % 2 == 1)


@fault("flip", NOISE)
def flips_by_the_word_of_t(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "random_flips", lambda address: noise.example_word(address, Stream.TIMESTEP) >= 2**31)
    monkeypatch.setattr(reference, "random_flips", noise.random_flips)


@fault("flip", OPS)
def flips_of_the_noise_too(monkeypatch: pytest.MonkeyPatch) -> None:
    diffuse = reference.q_sample

    def all_of_it(images, t, table, key, sample_index, *, flip=False, **options):
        x_t = diffuse(images, t, table, key, sample_index, **options)
        mirrored = reference.random_flips(noise.NoiseAddress(key, sample_index)).view(-1, 1, 1, 1) & flip
        return torch.where(mirrored, x_t.flip(-1), x_t)

    monkeypatch.setattr(trainer, "choose_ops", lambda *given: replace(REFERENCE, q_sample=all_of_it))


@fault("data", OPS)
def upside_down(monkeypatch: pytest.MonkeyPatch) -> None:
    normalize = reference._normalize
    monkeypatch.setattr(reference, "_normalize", lambda *given: normalize(*given).flip(2))


@fault("data", OPS)
def data_in_0_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    normalize = reference._normalize
    monkeypatch.setattr(reference, "_normalize", lambda *given: normalize(*given) / 2 + 0.5)


@fault("data", OPS)
def channels_reversed_before_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    normalize = reference._normalize
    monkeypatch.setattr(reference, "_normalize", lambda *given: normalize(*given).flip(1))


@pytest.mark.parametrize(("plant", "stage", "file"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS])
def test_a_planted_fault_is_named(monkeypatch, plant, stage, file):
    plant(monkeypatch)
    first = next(result for result in everything() if result.verdict is Verdict.WRONG)
    assert first.stage == stage
    assert file in first.file


def test_a_flip_that_was_not_asked_for_is_named(monkeypatch):
    normalize = reference._normalize
    monkeypatch.setattr(
        reference, "_normalize", lambda images, address, _, dtype: normalize(images, address, True, dtype)
    )
    wrong = [r for r in everything(replace(CONFIG, data=DataConfig())) if not r.passed]
    assert [(result.stage, result.verdict) for result in wrong] == [("flip", Verdict.WRONG)]


def test_chances_are_right():
    """Against SciPy's distributions."""
    stats = pytest.importorskip("scipy.stats")
    counts, shares = torch.tensor([10, 20, 30, 41]), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = stats.chisquare(counts.numpy(), shares.numpy() * 101).pvalue
    assert chance.of_counts(counts, shares) == pytest.approx(expected, rel=1e-5)
    assert chance.of_sigmas(2.5) == pytest.approx(2 * stats.norm.sf(2.5))
    z = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    distribution = next(p for name, p in chance.of_normal(z).items() if name.startswith("distribution"))
    assert distribution == pytest.approx(min(1, stats.kstest(z.numpy(), "norm").pvalue), abs=0.02)
    for n, p in ((30, 0.01), (30, 0.9), (5000, 0.1), (5000, 0.5)):
        most = chance.most_by_chance(n * p * (1 - p), max(p, 1 - p))
        assert stats.binom.sf(n * p + most, n, p) + stats.binom.cdf(n * p - most, n, p) <= chance.RARE
        exact = max(stats.binom.isf(chance.RARE / 2, n, p) - n * p, n * p - stats.binom.ppf(chance.RARE / 2, n, p))
        assert most < 3 * exact
