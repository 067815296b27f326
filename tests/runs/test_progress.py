"""What a run says without a terminal: where it is, how long it will take, what it does now; and not too often."""

import re

import pytest

from ddpm_fast.config import Config, TrainingConfig, UNetConfig, with_training
from ddpm_fast.presets import PRESETS
from ddpm_fast.runs import progress
from ddpm_fast.runs.progress import TrainingProgress
from tests.conftest import Clock


def take(shown: TrainingProgress, clock: Clock, seconds: float, steps: int = 1) -> None:
    for _ in range(steps):
        clock.seconds += seconds
        shown.step_done()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


LONG = Config(
    unet=UNetConfig(1, 28, 28, channels=64, channel_multipliers=(1, 2, 2), attention_resolutions=(14,)),
    training=TrainingConfig(steps=40_000),
)


def test_a_long_run_says_so_as_soon_as_steps_are_timed_and_names_a_shorter_one(clock, capsys):
    with TrainingProgress(LONG, 0, 0, bar=False) as shown:
        take(shown, clock, 28.0)
        (line,) = lines(capsys)
        take(shown, clock, 28.0, steps=3)
    # a step has 297 times the FLOPs of one of digits' 700
    assert line == "40,000 steps: about 13 days here (28 s per step); --preset digits takes about 66 s"
    assert lines(capsys) == []


def test_a_resumed_run_speaks_of_what_is_left(clock, capsys):
    with TrainingProgress(LONG, 30_000, 0, bar=False) as shown:
        take(shown, clock, 3.0)
    assert lines(capsys)[0].startswith("9,999 more steps: about 8.3 hours here (3 s per step)")


def test_a_short_run_has_no_outlook_and_compiling_is_not_timed(clock, capsys):
    with TrainingProgress(PRESETS["digits"], 0, 4, bar=False) as shown:
        take(shown, clock, 60.0, steps=4)
        take(shown, clock, 0.1, steps=50)
        assert shown.seconds_per_step == pytest.approx(0.1)
    assert lines(capsys) == []


def test_what_is_logged_is_said_but_not_more_often_than_every_few_seconds(clock, capsys):
    config = with_training(PRESETS["digits"], steps=100, batch_size=64)
    with TrainingProgress(config, 0, 0, bar=False) as shown:
        for _ in range(100):
            take(shown, clock, 0.5)
            seconds, images_per_s = shown.end_interval()
            assert (seconds, images_per_s) == (pytest.approx(0.5), pytest.approx(128))
            shown.report("loss 0.5000")
    said = lines(capsys)
    assert said[0] == "step 6 of 100: loss 0.5000, 128 images/s, 47 s left"
    assert said[-1] == "step 100 of 100: loss 0.5000, 128 images/s"
    assert len(said) == 17


def test_a_line_is_due_where_logging_is_far_apart(clock):
    with TrainingProgress(LONG, 0, 0, bar=False) as shown:
        take(shown, clock, 29.0)
        take(shown, clock, 29.0)
        assert not shown.line_due()  # the outlook was just said
        take(shown, clock, 10.0)
        assert shown.line_due()
        shown.report("loss 1.0000")
        assert not shown.line_due()


def test_other_work_is_named_when_it_takes_long_and_is_not_training(clock, capsys):
    with TrainingProgress(PRESETS["digits"], 0, 0, bar=False) as shown:
        take(shown, clock, 0.5, steps=8)
        for seconds in (10.0, 0.1, 10.0):
            with shown.doing("drawing 16 images"):
                clock.seconds += seconds
        with shown.doing("saving step 4", seconds=5.0):
            clock.seconds += 5
        assert shown.training_seconds == pytest.approx(4.0)
        assert shown.seconds_per_step == pytest.approx(0.5)
    # At first nothing had been said for a while; then the last one had taken long; then it had become quick.
    assert lines(capsys)[-3:] == ["drawing 16 images", "drawing 16 images", "saving step 4"]


def test_a_run_of_the_engine_says_its_steps(tmp_path, monkeypatch, capsys):
    from ddpm_fast.data.dataset import open_dataset
    from ddpm_fast.runs.run import Run

    monkeypatch.setattr(progress, "LEAST_SECONDS", 0.0)
    config = with_training(PRESETS["digits"], steps=4, log_every=2, batch_size=4, device="cpu", sample_every=0)
    Run(tmp_path / "run", config, open_dataset(config.data, config.unet), None, progress=False).train()
    said = lines(capsys)
    where = [line for line in said if line.startswith("step ")]
    assert re.fullmatch(r"step 2 of 4: loss \d\.\d{4}, [\d.e+]+ images/s, \d+ s left", where[0])
    assert re.fullmatch(r"step 4 of 4: loss \d\.\d{4}, evaluation \d\.\d{4} \([\d. ]+\), [\d.e+]+ images/s", where[1])
    assert "saving step 4" in said
