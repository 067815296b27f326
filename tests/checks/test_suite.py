"""The whole check: every preset is right, a fault anywhere ends in its line, and verdicts have their consequences."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.checks.results import CheckResult, Verdict, accepting, naming_errors, report
from ddpm_fast.checks.suite import check_run
from ddpm_fast.config import CheckConfig, Config, DiffusionConfig, UNetConfig, with_training
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.diffusion import noise, samplers, schedule
from ddpm_fast.engine.flat_weights import FlatWeights
from ddpm_fast.errors import InputError
from ddpm_fast.model import blocks
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import reference
from ddpm_fast.presets import PRESETS
from tests.checks.faults_in_the_network import change_source

CPU = torch.device("cpu")
SMALL_UNET = UNetConfig(1, 8, 8, 8, (1, 1), res_blocks=1, attention_resolutions=(), groups=4)
SMALL = replace(PRESETS["digits"], unet=SMALL_UNET, diffusion=DiffusionConfig(200, beta_end=0.08, variance="small"))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(SMALL.data, SMALL.unet)


def results(digits: Dataset, config: Config = SMALL) -> list[CheckResult]:
    return list(check_run(config, digits, CPU))


def test_the_demo_is_right(digits):
    config = PRESETS["digits"]
    assert {result.verdict for result in check_run(config, digits, CPU)} == {Verdict.RIGHT}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_right(name):
    config = PRESETS[name]
    if config.data.data:
        dataset = open_dataset(config.data, config.unet)
    else:
        shape = (300, config.unet.height, config.unet.width, config.unet.image_channels)
        dataset = Dataset(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), "", "")
    unusual = [result for result in check_run(config, dataset, CPU, full=name == "digits") if not result.passed]
    assert unusual == []


def uniform_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def rand(words0: Tensor, words1: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(((noise.uniform(word) - 0.5) * 12**0.5).to(dtype) for word in (words0, words1))

    monkeypatch.setattr(noise, "box_muller", rand)  # rand typed for randn, scaled to variance 1


def square_root_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    table = schedule.training_table

    def without_square_root(config: DiffusionConfig, gamma: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = table(config, gamma, dtype)
        rows[:, 0] = schedule.make_alpha_bar(config).to(dtype)
        return rows

    monkeypatch.setattr(schedule, "training_table", without_square_root)
    monkeypatch.setattr("ddpm_fast.engine.trainer.training_table", without_square_root)


def sign_flipped_in_ddim(monkeypatch: pytest.MonkeyPatch) -> None:
    direction = samplers._eps_direction
    monkeypatch.setattr(
        samplers, "_eps_direction", lambda alpha_bar, weight, prediction: direction(alpha_bar, -weight, prediction)
    )


def sign_of_eps_flipped_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = reference.noise_mse
    flipped = replace(ops.REFERENCE, noise_mse=lambda prediction, *rest, **options: loss(-prediction, *rest, **options))
    monkeypatch.setattr(ops, "REFERENCE", flipped)


def an_average_that_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    update = FlatWeights.update

    def forgetful(self: FlatWeights, *arguments: Any) -> None:
        before = self.ema.clone()
        update(self, *arguments)
        self.ema.copy_(before)

    monkeypatch.setattr(FlatWeights, "update", forgetful)


def blocks_that_add_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Callable[..., Any] = blocks.ResBlock.forward
    monkeypatch.setattr(blocks.ResBlock, "forward", lambda self, *arguments: 1.1 * forward(self, *arguments))


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, Verdict, str]] = [
    (uniform_noise, "noise", Verdict.WRONG, "diffusion/noise.py"),
    (square_root_forgotten, "schedule", Verdict.WRONG, "diffusion/schedule.py"),
    (sign_flipped_in_ddim, "sampler", Verdict.WRONG, "diffusion/samplers.py"),
    (sign_of_eps_flipped_in_training, "target", Verdict.WRONG, "ops/reference.py"),
    (an_average_that_never_moves, "ema", Verdict.WRONG, "engine/"),
    (blocks_that_add_too_much, "network", Verdict.CHANGED, "model/blocks.py"),
]


@pytest.mark.parametrize(
    ("plant", "stage", "verdict", "file"), FAULTS, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_planted_fault_is_the_first_line_to_look_at(digits, monkeypatch, plant, stage, verdict, file):
    plant(monkeypatch)
    unusual = [result for result in results(digits) if not result.passed]
    first = sorted(unusual, key=lambda result: result.verdict is not Verdict.WRONG)[0]
    assert (first.stage, first.verdict) == (stage, verdict)
    assert file in first.file


def line(stage: Any, verdict: Verdict) -> CheckResult:
    return CheckResult(stage, "two is two", verdict, "2", "3", "ddpm_fast/two.py")


def told(lines: Iterator[CheckResult], capsys: pytest.CaptureFixture[str], **options: bool) -> tuple[int, str]:
    return report(lines, **options), capsys.readouterr().out


def test_what_is_right_is_one_line(capsys):
    status, out = told(iter([line("ema", Verdict.RIGHT)] * 3), capsys)
    assert status == 0
    assert re.fullmatch(r"checking the mathematics: 3 checks passed in [\d.]+ s\n", out)


def test_what_is_wrong_comes_before_what_is_changed_and_says_how_to_accept_it(capsys):
    lines = [line("network", Verdict.CHANGED), line("ema", Verdict.RIGHT), line("sampler", Verdict.WRONG)]
    status, out = told(iter(lines), capsys)
    assert status == 3
    first, second, last = out.splitlines()[1:]
    assert first == "  FAIL    two is two: expected 2, found 3; look at ddpm_fast/two.py"
    assert second.startswith("  CHANGED two is two")
    assert last == "1 of 3 checks failed: the mathematics is wrong (if this is meant: --accept sampler)"


def test_what_is_changed_fails_only_if_strict(capsys):
    status, out = told(iter([line("network", Verdict.CHANGED)]), capsys)
    assert (status, "0 checks passed, 1 CHANGED" in out) == (0, True)
    status, out = told(iter([line("network", Verdict.CHANGED)]), capsys, strict=True)
    assert (status, "leave out --strict" in out) == (3, True)


def test_an_error_in_the_engine_is_a_line_that_says_where(digits, monkeypatch):
    change_source(monkeypatch, UNet, "denoise", "skips.pop()", "skips[-1].flatten()")
    first = next(result for result in check_run(SMALL, digits, CPU) if not result.passed)
    assert (first.stage, first.verdict) == ("network", Verdict.WRONG)
    assert re.search(r"ddpm_fast/model/unet.py:\d+.* ddpm_fast/engine/trainer.py:\d+", first.file)
    assert "Error: " in first.found


def test_what_cannot_be_done_is_no_fault():
    def refusing() -> Iterator[CheckResult]:
        raise InputError("--holdout leaves none")
        yield

    with pytest.raises(InputError):
        list(naming_errors("order", "examples are read", refusing()))


def test_what_was_wrong_before_a_crash_is_told(capsys):
    def lines() -> Iterator[CheckResult]:
        yield line("data", Verdict.WRONG)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        report(lines())
    assert "FAIL    two is two" in capsys.readouterr().out


def test_an_accepted_stage_is_changed_and_no_other_one():
    lines = [line("ema", Verdict.WRONG), line("sampler", Verdict.WRONG), line("ema", Verdict.RIGHT)]
    found = [result.verdict for result in accepting(lines, ("ema",))]
    assert found == [Verdict.CHANGED, Verdict.WRONG, Verdict.RIGHT]


def test_a_run_accepts_what_its_configuration_accepts(digits, monkeypatch):
    an_average_that_never_moves(monkeypatch)
    found = results(digits, replace(SMALL, checks=CheckConfig(("ema",))))
    assert Verdict.WRONG not in {result.verdict for result in found}
    assert {result.stage for result in found if result.verdict is Verdict.CHANGED} == {"ema"}


def test_values_far_from_the_presets_are_said(digits):
    found = [result for result in results(digits, with_training(SMALL, learning_rate=0.1)) if not result.passed]
    assert ("configuration", Verdict.CHANGED) in {(result.stage, result.verdict) for result in found}
