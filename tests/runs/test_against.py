"""A run judged against another: when is the sign certain, when is it too early, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm_fast.config import Config, with_training
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.runs import evaluation
from ddpm_fast.runs.against import EITHER_WAY, Judge, acts_late, reference
from ddpm_fast.runs.compare import open_run
from ddpm_fast.runs.directory import find_start
from ddpm_fast.runs.run import Run
from tests.runs.test_compare import DIGITS, evaluated, recorded
from tests.runs.test_run import DATA, TINY, run


def base_of(directory: Path, steps: tuple[int, ...] = (10, 100, 200, 500, 1000, 1200)) -> Path:
    recorded(directory)
    for step in steps:
        errors = torch.rand(evaluation.examples_at(step), generator=torch.Generator().manual_seed(step)) + 1
        evaluation.write(directory, step, evaluated(errors))
    return directory


def judged(directory: Path, changes: dict[int, float], config: Config = DIGITS) -> Judge:
    """Judge a run whose errors at each step are a share larger than the base's, give or take."""
    judge = Judge(open_run(base_of(directory)), config)
    for step, change in changes.items():
        theirs = judge.base.evaluated(step)
        assert theirs is not None
        errors = theirs.errors["ema"]
        spread = torch.randn(len(errors), generator=torch.Generator().manual_seed(0))
        judge.look(step, evaluated(errors * (1 + change * (1 + 0.5 * spread))))
    return judge


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "lower"), (1, "higher")])
def test_two_certain_evaluations_after_the_warm_up_decide(tmp_path, sign, verdict):
    assert judged(tmp_path / "early", {10: sign * 0.1}).verdict == "too early"
    once = judged(tmp_path / "once", {10: sign * 0.1, 100: sign * 0.1})
    assert (once.verdict, once.decided) == ("undecided", False)  # step 10 lies in the warm-up, of 100 steps
    twice = judged(tmp_path / "twice", {100: sign * 0.1, 200: sign * 0.1})
    assert (twice.verdict, twice.decided) == (verdict, True)
    said = twice.sentence()
    assert f": {'better' if sign < 0 else 'worse'}: evaluation loss" in said
    assert said.count(verdict) == 1
    assert "Loss is not sample quality" in said


def test_a_sign_that_turns_is_undecided(tmp_path):
    turned = judged(tmp_path, {100: 0.1, 200: -0.1})
    assert turned.verdict == "undecided"
    assert judged(tmp_path / "b", {100: 0.1, 200: -0.1, 500: -0.1}).verdict == "lower"


def test_no_difference_or_rounding_is_equal(tmp_path):
    equal = judged(tmp_path / "a", {100: 0, 200: 0})
    assert equal.verdict == "equal"
    assert equal.sentence().count("equal") == 1
    rounding = judged(tmp_path / "b", {100: 1e-6, 200: 1e-6})
    assert (rounding.verdict, rounding.decided) == ("equal", False)


def test_flags_that_act_late_are_too_early_until_they_have_acted(tmp_path):
    late = with_training(DIGITS, ema_decay=0.99)
    found = judged(tmp_path / "a", {500: 0, 1000: 0.1, 1200: 0.1}, late)
    assert (found.verdict, found.decided) == ("too early", True)
    assert (
        "--ema-decay acts late: both averages are alike to step 890, and forget that by step 1,890" in found.sentence()
    )
    assert acts_late(DIGITS, late)[0] == 890 + 5 * 200
    assert acts_late(DIGITS, with_training(DIGITS, steps=10))[0] == 1200
    assert acts_late(DIGITS, with_training(DIGITS, learning_rate=1.0)) == (0, "")
    assert acts_late(DIGITS, DIGITS) == (0, "")


def test_a_cooldown_counts_at_its_end(tmp_path):
    cooling = with_training(DIGITS, cooldown=0.25)
    assert judged(tmp_path / "a", {500: 0, 1000: -0.1}, cooling).verdict == "too early"
    found = judged(tmp_path / "b", {1000: -0.1, 1200: -0.1}, cooling)
    assert found.verdict == "lower"
    assert acts_late(DIGITS, cooling) == (
        1200,
        "a cooldown acts late: from step 900 on one rate falls, and it is for step 1,200",
    )
    assert acts_late(with_training(DIGITS, cooldown=0.5), cooling)[1].startswith("a cooldown acts late: from step 600")
    assert acts_late(cooling, with_training(cooling, steps=2400, learning_rate=1.0))[0] == 2400
    assert acts_late(cooling, with_training(cooling, learning_rate=1.0)) == (0, "")
    assert acts_late(DIGITS, with_training(cooling, ema_decay=0.999))[0] > 1200


def test_other_seeds_and_schedules_that_hardly_meet_get_no_verdict(tmp_path):
    seeds = judged(tmp_path / "a", {100: 0.1, 200: 0.1}, with_training(DIGITS, seed=1))
    assert seeds.verdict == "none"
    assert "they are of other seeds" in seeds.sentence()
    apart = Judge(open_run(base_of(tmp_path / "b")), DIGITS)
    theirs = apart.base.evaluated(100)
    assert theirs is not None
    few = torch.where(torch.arange(512) < 100, theirs.log_snr, theirs.log_snr + 1)
    for step in (100, 200):
        apart.look(step, replace(theirs, log_snr=few))
    assert apart.verdict == "none"
    assert "the same noise level at 100 addresses only" in apart.sentence()


def test_a_verdict_says_where_only_images_that_are_trained_on_were_asked_about(tmp_path):
    assert ", on images that are trained on: better" in judged(tmp_path, {100: -0.1, 200: -0.1}).sentence()


def test_where_nothing_is_common_there_is_no_verdict(tmp_path):
    judge = Judge(open_run(base_of(tmp_path)), DIGITS)
    errors = torch.rand(512)
    assert judge.look(700, evaluated(errors)) is None
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


@pytest.mark.slow
def test_a_run_stops_once_it_is_decided_and_remembers_after_a_stop(tmp_path):
    """A learning rate of almost nothing loses; the run that is stopped in between comes to the same verdict."""
    config = with_training(TINY, steps=210, save_every=300, warmup_steps=1, learning_rate=1e-2, batch_size=32)
    run(tmp_path / "base", config).train()
    base = open_run(tmp_path / "base")
    slow = with_training(config, learning_rate=1e-9)

    def against(directory: Path, steps: int) -> tuple[Run, Judge]:
        judge = Judge(base, slow, EITHER_WAY)
        found = find_start(directory, slow, DATA.fingerprint, resume=directory.exists())
        going = Run(directory, with_training(slow, steps=steps), DATA, found, False, judge)
        judge.recall(directory)
        return going, judge

    whole, judge = against(tmp_path / "whole", 210)
    whole.train()
    assert judge.verdict == "higher"
    assert whole.trainer.step == judge.found[-1].step < 210
    assert (tmp_path / f"whole/checkpoints/step-{whole.trainer.step:07d}").is_dir()
    first, _ = against(tmp_path / "stopped", whole.trainer.step - 1)
    first.train()
    second, judge_of_second = against(tmp_path / "stopped", 210)
    second.train()
    assert judge_of_second.verdict == "higher"
    assert second.trainer.step == whole.trainer.step
