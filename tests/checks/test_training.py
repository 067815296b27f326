"""Training against the textbook: faults planted in the engine, each of which must be named where it lies."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast.checks import network, stand_in, training
from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.checks.stand_in import small_trainer
from ddpm_fast.checks.training import check_training
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, with_training
from ddpm_fast.diffusion import schedule
from ddpm_fast.engine import trainer as engine
from tests.checks.faults_of_the_loss import (
    CONFIG,
    UNET,
    V,
    betas_of_another_schedule,
    channels_exchanged,
    every_image_flipped,
    every_other_step_is_left_out,
    flips_though_told_not_to,
    gamma_is_ignored,
    half_of_the_batch,
    half_of_the_timesteps,
    huber,
    images_in_0_1,
    largest_loss_alone,
    loss_of_half_the_batch,
    noise_of_q_sample_flipped,
    noise_of_the_last_batch,
    off_by_one_in_t,
    one_channel_only,
    parts_are_summed,
    sign_of_eps_flipped,
    square_root_forgotten,
    summed_over_channels,
    target_detached_from_the_right_side,
    the_first_batch_again_and_again,
    the_loss_gets_another_prediction,
    the_network_gets_another_t,
    the_prediction_is_clamped_in_the_loss,
    two_parts_at_most,
    uniform_timesteps_where_laplace_is_asked_for,
    upside_down,
    v_with_the_wrong_sign,
    weight_of_eps_for_v,
)
from tests.checks.faults_of_the_update import (
    another_adam_eps,
    another_beta,
    average_never_moves,
    average_of_all_but_one,
    average_of_the_weights_before,
    average_that_begins_at_zero,
    betas_exchanged,
    clipped_at_ten_times,
    clipped_by_parameter,
    clipped_by_value,
    clipped_though_short,
    cooldown_by_a_cosine,
    cooldown_one_step_late,
    cooldown_over_half_the_steps,
    decay_without_warm_up,
    decay_wrong_late,
    gradient_ascent,
    no_bias_correction,
    no_clipping,
    no_cooldown,
    no_warm_up,
    one_parameter_never_updated,
    rate_100_times_too_high,
    rate_never_applied,
    rate_that_decays,
    warm_up_one_step_late,
    weight_decay,
)

FITS = CheckResult("fit", "left out", Verdict.RIGHT, "", "", "")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Leave out what looks at the network, for faults that are planted elsewhere."""
    monkeypatch.setattr(stand_in, "EXAMPLES", 4)
    if request.node.originalname not in ("test_an_unbroken_engine_passes", "test_the_trainer_is_put_back"):
        for name in ("check_group_norm", "check_time_shifts", "check_dropout"):
            monkeypatch.setattr(training, name, lambda *given: ())
        monkeypatch.setattr(training, "check_upsampling", lambda *given: FITS)
        monkeypatch.setattr(training, "check_fit", lambda *given: FITS)
        monkeypatch.setattr(training, "check_network", lambda trainer, step, run: [network._check_arguments(step)])


Plant = Callable[[pytest.MonkeyPatch], None]


def batch(first: int, n: int) -> tuple[Tensor, Tensor]:
    """Return images that are unlike each other and their mirror images, and their numbers."""
    number, pixel = torch.arange(first, first + n), torch.arange(3 * 4 * 4)
    images = (number[:, None] * 37 + pixel * 5 + pixel**2 * number[:, None] % 61) % 256
    return images.to(torch.uint8).view(n, 4, 4, 3).permute(0, 3, 1, 2), number


def unusual(config: Config) -> list[CheckResult]:
    """Return what is not right, the first to look at first."""
    trainer = small_trainer(config, batch, torch.device("cpu"))
    found = [result for result in check_training(trainer, config) if not result.passed]
    return sorted(found, key=lambda result: result.verdict is not Verdict.WRONG)


RIGHT = {
    "eps": CONFIG,
    "v": V,
    "x0": replace(CONFIG, diffusion=DiffusionConfig(50, "sigmoid", prediction="x0"), data=DataConfig()),
    "unclipped": with_training(CONFIG, clip_norm=0.0, warmup_steps=0, min_snr_gamma=1.0),
    "one-channel-groups": replace(CONFIG, unet=replace(UNET, groups=8, dropout=0.0)),
    "three-groups": replace(CONFIG, unet=replace(UNET, channels=6, groups=3)),
    "one-timestep": replace(CONFIG, diffusion=DiffusionConfig(1)),
    "cooling": with_training(CONFIG, steps=40, warmup_steps=8, cooldown=0.2, adam_beta2=0.99),
    "one-step": with_training(CONFIG, steps=1, cooldown=1.0, adam_beta2=0.5),
}
COOLING = RIGHT["cooling"]


@pytest.mark.parametrize("name", RIGHT)
def test_an_unbroken_engine_passes(name):
    assert unusual(RIGHT[name]) == []


def test_the_trainer_is_put_back():
    trainer, fresh = (small_trainer(CONFIG, batch, torch.device("cpu")) for _ in range(2))
    list(check_training(trainer, CONFIG))
    assert trainer.step == 0
    for part, tensors in fresh.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(trainer.state()[part][name], tensor), name


REFERENCE, SCHEDULE, TRAINER = (
    f"ddpm_fast/{name}.py" for name in ("ops/reference", "diffusion/schedule", "engine/trainer")
)

FAULTS: list[tuple[Plant, Config, str, str]] = [
    (square_root_forgotten, CONFIG, "schedule", SCHEDULE),
    (betas_of_another_schedule, CONFIG, "schedule", SCHEDULE),
    (v_with_the_wrong_sign, V, "target", SCHEDULE),
    (weight_of_eps_for_v, V, "loss", SCHEDULE),
    (gamma_is_ignored, V, "loss", TRAINER),
    (off_by_one_in_t, CONFIG, "q_sample", REFERENCE),
    (images_in_0_1, CONFIG, "data", REFERENCE),
    (channels_exchanged, CONFIG, "data", REFERENCE),
    (upside_down, CONFIG, "data", REFERENCE),
    (every_image_flipped, CONFIG, "flip", REFERENCE),
    (flips_though_told_not_to, RIGHT["x0"], "flip", REFERENCE),
    (noise_of_q_sample_flipped, CONFIG, "noise", REFERENCE),
    (noise_of_the_last_batch, CONFIG, "noise", REFERENCE),
    (half_of_the_timesteps, CONFIG, "timesteps", TRAINER),
    (uniform_timesteps_where_laplace_is_asked_for, V, "timesteps", TRAINER),
    (the_first_batch_again_and_again, CONFIG, "order", TRAINER),
    (half_of_the_batch, CONFIG, "order", TRAINER),
    (two_parts_at_most, V, "order", TRAINER),
    (every_other_step_is_left_out, CONFIG, "order", TRAINER),
    (loss_of_half_the_batch, CONFIG, "loss", TRAINER),
    (parts_are_summed, V, "loss", TRAINER),
    (largest_loss_alone, CONFIG, "loss", TRAINER),
    (the_network_gets_another_t, CONFIG, "network", TRAINER),
    (the_loss_gets_another_prediction, CONFIG, "network", TRAINER),
    (the_prediction_is_clamped_in_the_loss, CONFIG, "gradient", REFERENCE),
    (sign_of_eps_flipped, CONFIG, "target", REFERENCE),
    (summed_over_channels, V, "loss", REFERENCE),
    (one_channel_only, CONFIG, "loss", REFERENCE),
    (target_detached_from_the_right_side, CONFIG, "gradient", REFERENCE),
    (rate_100_times_too_high, CONFIG, "optimizer", REFERENCE),
    (rate_never_applied, CONFIG, "optimizer", REFERENCE),
    (no_warm_up, CONFIG, "optimizer", REFERENCE),
    (warm_up_one_step_late, CONFIG, "optimizer", REFERENCE),
    (rate_that_decays, CONFIG, "optimizer", REFERENCE),
    (no_cooldown, COOLING, "optimizer", REFERENCE),
    (cooldown_one_step_late, COOLING, "optimizer", REFERENCE),
    (cooldown_over_half_the_steps, COOLING, "optimizer", REFERENCE),
    (cooldown_by_a_cosine, COOLING, "optimizer", REFERENCE),
    (betas_exchanged, CONFIG, "optimizer", REFERENCE),
    (another_beta, CONFIG, "optimizer", REFERENCE),
    (another_beta, COOLING, "optimizer", REFERENCE),
    (another_adam_eps, CONFIG, "optimizer", REFERENCE),
    (weight_decay, CONFIG, "optimizer", REFERENCE),
    (gradient_ascent, CONFIG, "optimizer", REFERENCE),
    (no_bias_correction, CONFIG, "optimizer", REFERENCE),
    (one_parameter_never_updated, CONFIG, "optimizer", REFERENCE),
    (no_clipping, CONFIG, "clipping", REFERENCE),
    (clipped_at_ten_times, CONFIG, "clipping", REFERENCE),
    (clipped_though_short, CONFIG, "clipping", REFERENCE),
    (clipped_by_parameter, CONFIG, "clipping", REFERENCE),
    (clipped_by_value, CONFIG, "clipping", REFERENCE),
    (average_that_begins_at_zero, CONFIG, "ema", "engine/flat_weights.py"),
    (average_never_moves, CONFIG, "ema", REFERENCE),
    (decay_wrong_late, CONFIG, "ema", REFERENCE),
    (decay_without_warm_up, CONFIG, "ema", REFERENCE),
    (average_of_the_weights_before, CONFIG, "ema", REFERENCE),
    (average_of_all_but_one, CONFIG, "ema", REFERENCE),
]


ALSO = {
    "noise_of_q_sample_flipped": "target",  # the loss makes another eps
    "two_parts_at_most": "loss",
    "half_of_the_batch": "loss",  # its mean is another
    "the_prediction_is_clamped_in_the_loss": "loss",  # which is CHANGED: another function of the error
    "one_parameter_never_updated": "ema",  # which has seen it move
}
"""What else goes wrong by the fault itself."""


@pytest.mark.parametrize(("plant", "config", "stage", "file"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_fault_is_named_where_it_lies_and_nowhere_else(monkeypatch, plant, config, stage, file):
    plant(monkeypatch)
    found = unusual(config)
    assert (found[0].stage, found[0].verdict) == (stage, Verdict.WRONG)
    assert file in found[0].file
    assert {result.stage for result in found} <= {stage, ALSO.get(plant.__name__, stage)}


def test_huber_loss_is_a_change_and_trains(monkeypatch):
    huber(monkeypatch)
    (found,) = unusual(CONFIG)
    assert (found.stage, found.verdict, found.file) == ("loss", Verdict.CHANGED, REFERENCE)
    assert "another function of the error" in found.found


def test_a_schedule_that_the_textbook_lacks_is_a_change_and_all_else_is_checked(monkeypatch):
    betas = torch.linspace(1e-4, 0.1, 1000, dtype=torch.float64) ** 1.5
    monkeypatch.setattr(schedule, "betas", lambda config: betas)
    (found,) = unusual(replace(CONFIG, diffusion=named("ours", "schedule")))
    assert (found.stage, found.verdict, found.found) == ("schedule", Verdict.CHANGED, "ours")
    square_root_forgotten(monkeypatch)
    assert unusual(replace(CONFIG, diffusion=named("ours", "schedule")))[0].verdict is Verdict.WRONG


def test_a_prediction_that_the_textbook_lacks_is_a_change(monkeypatch):
    table = schedule.training_table

    def ours(config: DiffusionConfig, *rest: Any) -> Tensor:
        return table(replace(config, prediction="eps"), *rest)

    monkeypatch.setattr(schedule, "training_table", ours)
    monkeypatch.setattr(engine, "training_table", ours)
    (found,) = unusual(replace(CONFIG, diffusion=named("ours", "prediction")))
    assert (found.stage, found.verdict, found.found) == ("target", Verdict.CHANGED, "ours")


def named(name: str, field: str) -> DiffusionConfig:
    """Return a configuration with a name that its dataclass would refuse."""
    diffusion = DiffusionConfig()
    object.__setattr__(diffusion, field, name)
    return diffusion
