"""Values far from the preset's are said, and no others."""

from dataclasses import replace

import pytest

from ddpm_fast.checks.configuration import MEASURES, check_configuration
from ddpm_fast.checks.results import Verdict
from ddpm_fast.config import Config
from ddpm_fast.flags import with_flags
from ddpm_fast.presets import PRESETS

CIFAR10 = PRESETS["cifar10"]


def changed(config: Config) -> dict[str, tuple[str, str]]:
    results = check_configuration(config)
    return {result.name: (result.expected, result.found) for result in results if result.verdict is Verdict.CHANGED}


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_is_far_from_itself(name):
    assert [result.passed for result in check_configuration(PRESETS[name])] == [True]


@pytest.mark.parametrize(
    ("flags", "name", "values"),
    [
        ({"learning_rate": 2e-2}, "--learning-rate", ("0.0002", "0.02")),
        ({"learning_rate": 2e-6}, "--learning-rate", ("0.0002", "2e-06")),
        ({"beta_end": 0.5}, "--beta-end", ("0.02", "0.5")),
        ({"clip_norm": 50.0}, "--clip-norm", ("1", "50")),
        ({"ema_decay": 0.99}, "--ema-decay", ("0.9999", "0.99")),
        ({"ema_decay": 0.99999999}, "--ema-decay", ("0.9999", "1")),
        ({"dropout": 0.95}, "--dropout", ("0.1", "0.95")),
        ({"batch_size": 2}, "--batch-size", ("128", "2")),
        ({"warmup_steps": 0}, "--warmup-steps", ("5000", "0")),
        ({"timesteps": 50}, "--timesteps", ("1000", "50")),
    ],
)
def test_a_value_far_from_its_presets_is_said_with_both(flags, name, values):
    (said,) = changed(with_flags(CIFAR10, flags)).items()
    assert said[0] == f"{name} is near its preset's"
    assert values[0] in said[1][0].split()[1].rstrip(",")
    assert said[1][1] == values[1]


@pytest.mark.parametrize(
    "flags",
    [
        {"learning_rate": 2e-3},
        {"learning_rate": 2e-5},
        {"ema_decay": 0.999},
        {"clip_norm": 0.0},
        {"min_snr_gamma": 5.0},
        {"steps": 1, "log_every": 1, "save_every": 1, "sample_every": 0},
    ],
)
def test_ten_times_switching_off_and_what_a_run_decides_for_itself_are_not_far(flags):
    assert changed(with_flags(CIFAR10, flags)) == {}


def test_a_configuration_of_no_preset_has_nothing_to_be_far_from():
    assert list(check_configuration(replace(CIFAR10, preset="mine"))) == []


def test_every_measure_is_a_flag():
    fields = {name for part in (CIFAR10.unet, CIFAR10.diffusion, CIFAR10.training) for name in vars(part)}
    assert MEASURES.keys() <= fields
