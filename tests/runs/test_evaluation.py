"""The evaluation loss: what it is the mean of, where and when."""

from dataclasses import replace

import pytest
import torch

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.constants import Stream
from ddpm_fast.data.batches import BatchSource, split
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed, normal
from ddpm_fast.diffusion.schedule import make_alpha_bar
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.runs import evaluation
from ddpm_fast.runs.evaluation import (
    ADDRESSES,
    BANDS,
    EARLY_ADDRESSES,
    SEED,
    Evaluation,
    EvaluationSet,
    bands,
    is_due,
    log_snrs,
    nearest_timesteps,
)

CPU = torch.device("cpu")
TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=300),
    data=DataConfig(data="digits"),
    training=TrainingConfig(steps=6, batch_size=64, warmup_steps=3, device="cpu"),
)
DATA = open_dataset(TINY.data, TINY.unet)


def trainer_of(config: Config) -> Trainer:
    """Return a trainer whose weights hide nothing: its first ones predict zero."""
    source = BatchSource(DATA, key_from_seed(config.training.seed), CPU, config.data.holdout)
    trainer = Trainer(config, source.batch, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for average in trainer.ema.values():
            average += 0.1 * torch.randn(average.shape, generator=generator)
    trainer.step = 100
    return trainer


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_error_is_that_of_the_split_into_signal_and_noise(prediction):
    """Written out from x_t, alpha_bar and each prediction's own definition, in float64."""
    config = replace(TINY, diffusion=replace(TINY.diffusion, prediction=prediction))
    trainer = trainer_of(config)
    found = EvaluationSet(config, DATA, CPU).evaluate(trainer).errors["raw"]
    evaluated = EvaluationSet(config, DATA, CPU)
    t, _ = nearest_timesteps(config.diffusion, ADDRESSES)
    alpha_bar = make_alpha_bar(config.diffusion)[t].view(-1, 1, 1, 1)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_start = evaluated._examples[0].double() / 127.5 - 1
    address = NoiseAddress(key_from_seed(SEED), torch.arange(ADDRESSES))
    eps = normal(address, 0, Stream.TRAINING, (1, 8, 8)).double()
    x_t = signal * x_start + noise * eps
    with torch.no_grad():
        output = trainer.unet(x_t.float(), t).double()
    x0 = {
        "eps": (x_t - noise * output) / signal,
        "x0": output,
        "v": signal * x_t - noise * output,  # Salimans and Ho 2022, Appendix D
    }[prediction]
    of_signal = (signal * x0 - signal * x_start).square().mean(dim=(1, 2, 3))
    of_noise = ((x_t - signal * x0) - noise * eps).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(of_signal, of_noise, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.double(), of_signal, rtol=1e-3, atol=1e-6)


def test_averaged_and_last_weights_are_told_apart():
    trainer = trainer_of(TINY)
    errors = EvaluationSet(TINY, DATA, CPU).evaluate(trainer).errors
    assert set(errors) == {"ema", "raw"}
    assert not torch.allclose(errors["ema"], errors["raw"])
    for name, parameter in trainer.parameters.items():
        trainer.ema[name].copy_(parameter.data)
    same = EvaluationSet(TINY, DATA, CPU).evaluate(trainer).errors
    assert torch.equal(same["ema"], same["raw"])
    assert torch.equal(same["raw"], errors["raw"])


def test_neither_seed_nor_flips_nor_dropout_nor_the_batch_change_what_is_asked():
    trainer = trainer_of(TINY)
    errors = EvaluationSet(TINY, DATA, CPU).evaluate(trainer).errors["raw"]
    other = with_training(TINY, seed=9, batch_size=48)
    other = replace(other, data=replace(TINY.data, flip=True), unet=replace(TINY.unet, dropout=0.5))
    again = trainer_of(other)
    again.load_state(100, trainer.state())
    torch.testing.assert_close(
        EvaluationSet(other, DATA, CPU).evaluate(again).errors["raw"], errors, rtol=1e-4, atol=1e-6
    )


def test_a_hold_out_is_evaluated_beside_what_is_trained_on():
    config = replace(TINY, data=replace(TINY.data, holdout=0.1))
    evaluated = EvaluationSet(config, DATA, CPU)
    assert set(evaluated.evaluate(trainer_of(config)).errors) == {"ema", "raw", "training_ema"}
    trained, held_out = split(len(DATA), 0.1)
    assert evaluated._training_examples is not None
    for (images,), rows in ((evaluated._examples, held_out), (evaluated._training_examples, trained)):
        own = {bytes(image) for image in DATA.images[rows.numpy()]}
        assert {bytes(image.permute(1, 2, 0).numpy()) for image in images} <= own


def test_the_address_says_which_image_it_has():
    evaluated = EvaluationSet(TINY, DATA, CPU)
    expected = torch.from_numpy(DATA.images[evaluated.rows.numpy()]).permute(0, 3, 1, 2)
    assert torch.equal(evaluated._examples[0], expected)
    assert len(evaluated.rows.unique()) == ADDRESSES


@pytest.mark.parametrize("count", [EARLY_ADDRESSES, ADDRESSES])
def test_any_number_of_addresses_fills_the_noise_levels_evenly(count):
    gaps = log_snrs(count).sort().values.diff()
    assert log_snrs(count).abs().max() <= 9
    assert gaps.max() < 3 * 18 / count
    assert bands(count).bincount(minlength=BANDS).tolist() == pytest.approx([count / BANDS] * BANDS, abs=2)
    assert torch.equal(log_snrs(ADDRESSES)[:count], log_snrs(count))


def test_timesteps_are_those_of_the_noise_levels():
    for schedule in ("linear", "cosine", "sigmoid"):
        config = DiffusionConfig(schedule=schedule)
        (t, log_snr), alpha_bar = nearest_timesteps(config, ADDRESSES), make_alpha_bar(config)
        of_t, wanted = torch.logit(alpha_bar)[t], log_snrs(ADDRESSES)
        torch.testing.assert_close(log_snr.double(), of_t, rtol=1e-6, atol=1e-6)
        inside = (wanted > torch.logit(alpha_bar).min()) & (wanted < torch.logit(alpha_bar).max())
        assert inside.sum() > 0.9 * ADDRESSES
        neighbours = torch.stack([torch.logit(alpha_bar)[(t + d).clamp(0, 999)] for d in (-1, 1)])
        assert bool(((of_t - wanted).abs() <= (neighbours - wanted).abs()).all())


def due(batch_size: int, steps: range, holdout: float = 0) -> list[int]:
    config = with_training(replace(TINY, data=replace(TINY.data, holdout=holdout)), batch_size=batch_size)
    return [step for step in steps if is_due(step, config)]


def test_when_it_is_due():
    assert due(64, range(20_001)) == [
        *(10, 20, 50, 100, 200, 500, 1000, 2000, 4000, 5000, 6000, 8000, 10_000, 12_000, 14_000, 16_000, 18_000, 20_000)
    ]
    assert due(8, range(1001)) == [500, 1000]
    assert [evaluation.examples_at(step) for step in (10, 50, 100, 5000)] == [128, 128, 512, 512]


@pytest.mark.parametrize("holdout", [0, 0.1])
def test_it_takes_little_of_the_time_of_training(holdout):
    """A forward pass takes a third of a step on as many images, and there are two or three of them."""
    passes = 3 if holdout else 2
    for batch in (8, 64, 256):
        steps_per_address = passes / 3 / batch
        often = due(batch, range(100_000, 200_000), holdout)
        assert len(often) * ADDRESSES * steps_per_address <= 0.006 * 100_000
        at_start = due(batch, range(1201), holdout)
        assert sum(evaluation.examples_at(step) for step in at_start) * steps_per_address <= 0.11 * 1200


def test_what_is_kept_comes_back_and_is_cut_back(tmp_path):
    errors = {"ema": torch.rand(128), "raw": torch.rand(128)}
    kept = Evaluation(errors, torch.randperm(128), torch.rand(128))
    for step in (10, 20, 100):
        evaluation.write(tmp_path, step, kept)
    evaluation.cut_back(tmp_path, 20)
    assert evaluation.evaluated_steps(tmp_path) == [10, 20]
    found = evaluation.read(tmp_path, 20)
    assert found is not None
    assert all(torch.equal(found.errors[name], errors[name]) for name in errors)
    assert torch.equal(found.image, kept.image)
    assert torch.equal(found.log_snr, kept.log_snr)
    assert evaluation.read(tmp_path, 100) is None
    (tmp_path / "evaluation/step-0000010.safetensors").write_bytes(b"torn")
    assert evaluation.read(tmp_path, 10) is None
    summary = evaluation.summary(kept)
    assert summary["ema"] == pytest.approx(float(errors["ema"].mean()), rel=1e-6)
    assert len(evaluation.by_band(errors["ema"])) == BANDS
    said = {"ema": 0.01479, "raw": 0.01631, "bands": [0.0014, 0.0113, 0.0494, 0.0112, 0.0007]}
    assert evaluation.in_words(said) == "evaluation 0.0148 (0.0014 0.011 0.049 0.011 0.0007)"
    assert evaluation.in_words(said | {"training_ema": 0.0135}).endswith(", of training images 0.0135")
