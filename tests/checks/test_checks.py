"""Each planted fault makes the right line fail, and an unbroken engine passes every line."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.checks import mathematics as check
from ddpm_fast.checks.mathematics import CheckResult, check_start
from ddpm_fast.config import Config, DiffusionConfig, UNetConfig
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.diffusion import noise, samplers, schedule
from ddpm_fast.model import blocks, unet
from ddpm_fast.ops import reference
from ddpm_fast.presets import PRESETS

SMALL_UNET = UNetConfig(1, 8, 8, 16, (1, 1), res_blocks=1, attention_resolutions=(), groups=8)
SMALL = replace(PRESETS["digits"], unet=SMALL_UNET, diffusion=DiffusionConfig(variance="small"))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(SMALL.data, SMALL.unet)


def failing(lines: Iterator[CheckResult]) -> set[str]:
    return {line.name for line in lines if not line.passed}


def lines_of(digits: Dataset, config: Config = SMALL) -> Iterator[CheckResult]:
    return check_start(config, digits, torch.device("cpu"))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule_name", ["linear", "cosine"])
def test_an_unbroken_engine_passes(digits, prediction, schedule_name):
    diffusion = replace(SMALL.diffusion, prediction=prediction, schedule=schedule_name)
    assert failing(lines_of(digits, replace(SMALL, diffusion=diffusion))) == set()


def test_a_failure_names_the_file_and_exits_with_3(digits, capsys):
    line = CheckResult("two is two", False, "2", "3", "ddpm_fast/two.py")
    assert check.report(iter([line])) == 3
    assert "FAIL two is two: expected 2, found 3; look at ddpm_fast/two.py" in capsys.readouterr().out
    assert check.report(iter([replace(line, passed=True)])) == 0


def uniform_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def rand(words0, words1, dtype=torch.float32):  # rand typed for randn, scaled to variance 1
        return tuple(((noise.uniform(w) - 0.5) * 12**0.5).to(dtype) for w in (words0, words1))

    monkeypatch.setattr(noise, "box_muller", rand)


def noise_reused_between_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = noise.normal

    def one_a_row(address, step, stream, shape, dtype=torch.float32):
        return normal(address, step, stream, shape, dtype)[..., :1].expand(-1, -1, -1, shape[2])

    monkeypatch.setattr(reference, "normal", one_a_row)


def noise_reused_between_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = noise.normal

    def of_one_sample(address, *rest):
        return normal(noise.NoiseAddress(address.key, torch.zeros_like(address.sample_index)), *rest)

    monkeypatch.setattr(reference, "normal", of_one_sample)


def square_root_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    table = schedule.training_table

    def without_square_root(config, min_snr_gamma=0.0, dtype=torch.float32):
        rows = table(config, min_snr_gamma, dtype)
        rows[:, 0] = schedule.make_alpha_bar(config).to(dtype)
        return rows

    monkeypatch.setattr(schedule, "training_table", without_square_root)
    monkeypatch.setattr("ddpm_fast.engine.trainer.training_table", without_square_root)


def betas_ten_times_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = schedule.linear_betas
    monkeypatch.setattr(schedule, "linear_betas", lambda *arguments: linear(*arguments) / 10)


def data_left_in_0_255(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_normalize", lambda images, address, flip, dtype: images.to(dtype))


def t_never_reaches_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    shifts = unet.UNet.time_shifts
    monkeypatch.setattr(unet.UNet, "time_shifts", lambda self, t: shifts(self, torch.zeros_like(t)))


def a_frozen_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    build = blocks.ResBlock.__init__

    def frozen(self, *arguments):
        build(self, *arguments)
        self.conv1.weight.requires_grad_(False)

    monkeypatch.setattr(blocks.ResBlock, "__init__", frozen)


def replace_op(monkeypatch: pytest.MonkeyPatch, **op: Callable[..., Any]) -> None:
    monkeypatch.setattr(ops, "REFERENCE", replace(ops.REFERENCE, **op))


def sign_of_eps_flipped_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = reference.noise_mse
    replace_op(monkeypatch, noise_mse=lambda prediction, *rest, **options: loss(-prediction, *rest, **options))


def sign_of_eps_flipped_in_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    step = reference.reverse_step
    replace_op(monkeypatch, reverse_step=lambda x, out, *rest, **options: step(x, -out, *rest, **options))


def wrong_posterior_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = samplers.ddpm_rows

    def with_variance_for_deviation(*arguments):
        row = rows(*arguments)
        return row._replace(noise=row.noise**2)

    monkeypatch.setattr(samplers, "ddpm_rows", with_variance_for_deviation)


def wrong_posterior_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = samplers.ddpm_rows

    def with_terms_exchanged(*arguments):
        row = rows(*arguments)
        return row._replace(next_from_x0=row.next_from_x, next_from_x=row.next_from_x0)

    monkeypatch.setattr(samplers, "ddpm_rows", with_terms_exchanged)


def an_average_that_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    update = reference.adam_ema

    def forgetting_it(weights, exp_avg, exp_avg_sq, ema, *rest, **options):
        update(weights, exp_avg, exp_avg_sq, ema.clone(), *rest, **options)

    replace_op(monkeypatch, adam_ema=forgetting_it)


def off_by_one_between_table_and_t(monkeypatch: pytest.MonkeyPatch) -> None:
    q_sample = reference.q_sample

    def one_late(images, t, table, *rest, **options):
        return q_sample(images, (t + 1).clamp(max=len(table) - 1), table, *rest, **options)

    replace_op(monkeypatch, q_sample=one_late)


def clipping_forgets_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    ddim = samplers.ddim_rows

    def shrunk(*arguments):
        row = ddim(*arguments)
        return row._replace(next_from_x0=row.next_from_x0 * 0.99)

    monkeypatch.setattr(samplers, "ddim_rows", shrunk)


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (uniform_noise, "training noise is N(0, 1)"),
    (uniform_noise, "sampling noise is N(0, 1)"),
    (noise_reused_between_pixels, "training noise is independent"),
    (noise_reused_between_samples, "sampling noise is independent"),
    (square_root_forgotten, "signal is sqrt(alpha_bar)"),
    (square_root_forgotten, "Var[x_t] = 1 at every t"),
    (betas_ten_times_too_small, "the schedule ends in noise"),
    (data_left_in_0_255, "data lies in [-1, 1]"),
    (t_never_reaches_the_network, "the output depends on t"),
    (a_frozen_layer, "every parameter receives a finite gradient"),
    (sign_of_eps_flipped_in_training, "the loss of the true eps is 0"),
    (sign_of_eps_flipped_in_sampling, "ddim with the true prediction ends on the data"),
    (wrong_posterior_variance, "the posterior variance is the fixed small one"),
    (wrong_posterior_mean, "the posterior mean is Bayes' rule"),
    (an_average_that_never_moves, "the weights' average follows"),
    (off_by_one_between_table_and_t, "q_sample, then predicting x_start, gives the data back"),
    (clipping_forgets_the_range, "ddim with the true prediction ends on the data"),
]


@pytest.mark.parametrize(("plant", "expected"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_fault_fails_the_right_line(digits, monkeypatch, plant, expected):
    plant(monkeypatch)
    assert expected in failing(lines_of(digits))


def test_data_of_another_shape_is_named(digits):
    wide = Dataset(digits.images[:, :, :4], "", "")
    lines = check.check_data(check._small_trainer(SMALL, wide, torch.device("cpu"), None), (1, 8, 8))
    assert "images fit the U-Net" in failing(lines)


def test_a_schedule_of_few_steps_is_caught():
    assert "the schedule ends in noise" in failing(check.check_schedule(DiffusionConfig(timesteps=10)))
