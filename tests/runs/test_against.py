"""A run judged against another: when is the sign certain, when is it too early, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm_fast.config import Config, with_training
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.presets import PRESETS
from ddpm_fast.runs import evaluation
from ddpm_fast.runs.against import EITHER_WAY, Judge, acts_late, reference
from ddpm_fast.runs.compare import open_run
from ddpm_fast.runs.directory import find_start
from ddpm_fast.runs.run import Run
from tests.runs.test_compare import recorded
from tests.runs.test_run import DATA, TINY, run

DIGITS = PRESETS["digits"]


def base_of(directory: Path, steps: tuple[int, ...] = (10, 100, 200, 500)) -> Path:
    recorded(directory)
    for step in steps:
        errors = torch.rand(evaluation.examples_at(step), generator=torch.Generator().manual_seed(step)) + 1
        evaluation.write(directory, step, {"ema": errors, "raw": errors + 1})
    return directory


def judged(directory: Path, changes: dict[int, float], config: Config = DIGITS) -> Judge:
    """Judge a run whose errors at each step are a share larger than the base's, give or take."""
    judge = Judge(open_run(base_of(directory)), config)
    for step, change in changes.items():
        theirs = judge.base.errors(step)
        assert theirs is not None
        spread = torch.randn(len(theirs["ema"]), generator=torch.Generator().manual_seed(0))
        judge.look(step, {"ema": theirs["ema"] * (1 + change * (1 + 0.5 * spread)), "raw": theirs["raw"]})
    return judge


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "lower"), (1, "higher")])
def test_two_certain_evaluations_after_the_warm_up_decide(tmp_path, sign, verdict):
    assert judged(tmp_path / "early", {10: sign * 0.1}).verdict == "too early"
    once = judged(tmp_path / "once", {10: sign * 0.1, 100: sign * 0.1})
    assert (once.verdict, once.decided) == ("undecided", False)  # step 10 lies in the warm-up, of 100 steps
    twice = judged(tmp_path / "twice", {100: sign * 0.1, 200: sign * 0.1})
    assert (twice.verdict, twice.decided) == (verdict, True)
    assert verdict in twice.sentence()
    assert "Loss is not sample quality" in twice.sentence()


def test_a_sign_that_turns_is_undecided(tmp_path):
    turned = judged(tmp_path, {100: 0.1, 200: -0.1})
    assert turned.verdict == "undecided"
    assert judged(tmp_path / "b", {100: 0.1, 200: -0.1, 500: -0.1}).verdict == "lower"


def test_no_difference_is_equal_and_for_late_flags_too_early(tmp_path):
    assert judged(tmp_path / "a", {100: 0, 200: 0}).verdict == "equal"
    late = with_training(DIGITS, ema_decay=0.9999)
    found = judged(tmp_path / "b", {100: 0, 200: 0}, late)
    assert found.verdict == "too early"
    assert "--ema-decay acts late: both averages warm up alike to step 1,790" in found.sentence()
    assert acts_late(DIGITS, with_training(DIGITS, steps=10)) == "--steps changes nothing while both runs go on"
    assert acts_late(DIGITS, with_training(DIGITS, steps=10, learning_rate=1.0)) == ""
    assert acts_late(DIGITS, DIGITS) == ""


def test_where_nothing_is_common_there_is_no_verdict(tmp_path):
    judge = Judge(open_run(base_of(tmp_path)), DIGITS)
    errors = torch.rand(512)
    assert judge.look(1200, {"ema": errors, "raw": errors}) is None
    assert judge.verdict == "none"
    assert "no step was evaluated in both" in judge.sentence()
    judge.write(tmp_path)
    assert json.loads((tmp_path / "verdict.json").read_text()) == {"against": str(tmp_path), "verdict": "none"}


def test_other_images_are_refused(tmp_path):
    data = open_dataset(DIGITS.data, DIGITS.unet)
    base = base_of(tmp_path / "base")
    with pytest.raises(InputError, match="was trained on other images"):
        reference(str(base), DIGITS, data)
    base = recorded(tmp_path / "same", fingerprint=data.fingerprint)
    assert reference(str(base), DIGITS, data).path == base
    with pytest.raises(InputError, match="--holdout"):
        reference(str(base), replace(DIGITS, data=replace(DIGITS.data, holdout=0.1)), data)
    for file in (base / "evaluation").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="was never evaluated"):
        reference(str(base), DIGITS, Dataset(data.images, data.fingerprint, ""))


def test_a_run_stops_once_it_is_decided_and_remembers_after_a_stop(tmp_path):
    """A learning rate of almost nothing loses; the run that is stopped in between comes to the same verdict."""
    config = with_training(TINY, steps=50, save_every=50, warmup_steps=1, learning_rate=1e-2)
    run(tmp_path / "base", config).train()
    base = open_run(tmp_path / "base")
    slow = with_training(config, learning_rate=1e-9)

    def against(directory: Path, steps: int) -> tuple[Run, Judge]:
        judge = Judge(base, slow, EITHER_WAY)
        found = find_start(directory, slow, DATA.fingerprint, resume=directory.exists())
        going = Run(directory, with_training(slow, steps=steps), DATA, found, False, judge)
        judge.recall(directory)
        return going, judge

    whole, judge = against(tmp_path / "whole", 50)
    whole.train()
    assert judge.verdict == "higher"
    assert whole.trainer.step == judge.found[-1].step < 50
    assert (tmp_path / f"whole/checkpoints/step-{whole.trainer.step:07d}").is_dir()
    first, _ = against(tmp_path / "stopped", whole.trainer.step - 1)
    first.train()
    second, judge_of_second = against(tmp_path / "stopped", 50)
    second.train()
    assert judge_of_second.verdict == "higher"
    assert second.trainer.step == whole.trainer.step
