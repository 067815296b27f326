"""A run whose learning rate falls at its end, continued: for the same steps, and for more of them."""

import shutil
import signal
from pathlib import Path

import pytest

from ddpm_fast.config import Config, with_training
from ddpm_fast.errors import InputError
from ddpm_fast.launch import train_config
from ddpm_fast.options import StartOptions
from ddpm_fast.runs.directory import find_start
from ddpm_fast.runs.signals import InterruptedRunError
from tests.runs.test_run import DATA, TINY, files, metrics, run, signal_after

COOLING = with_training(TINY, steps=5, cooldown=0.4, save_every=10, log_every=1)
LONGER = with_training(COOLING, steps=10)


def stop_after(directory: Path, step: int, config: Config, resume: bool = False) -> None:
    stopped = run(directory, config, resume)
    signal_after(stopped, step, signal.SIGTERM)
    with pytest.raises(InterruptedRunError):
        stopped.train()


@pytest.mark.parametrize("stopped_at", [2, 4, 5])
def test_more_steps_continue_from_before_the_cooldown_as_if_there_had_been_none(tmp_path, stopped_at):
    """Whether the run was stopped before its cooldown, in it, or never."""
    run(tmp_path / "whole", LONGER).train()
    stop_after(tmp_path / "longer", stopped_at, COOLING) if stopped_at < 5 else run(
        tmp_path / "longer", COOLING
    ).train()
    longer = run(tmp_path / "longer", LONGER, resume=True)
    assert longer.trainer.step == min(stopped_at, 3)
    assert [line["step"] for line in metrics(tmp_path / "longer")] == list(range(1, longer.trainer.step + 1))
    longer.train()
    for place in ("checkpoints/step-0000010", "evaluation"):
        assert files(tmp_path / "whole" / place) == files(tmp_path / "longer" / place)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "longer")
    rates = [line["learning_rate"] / COOLING.training.learning_rate for line in metrics(tmp_path / "longer")]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4], rel=1e-6)


def test_weights_of_a_fallen_rate_are_passed_over_until_newer_ones_are_saved(tmp_path):
    """Also where the longer run was stopped before it saved anything: the shorter one's last step is still there."""
    run(tmp_path, COOLING).train()
    for _ in range(2):
        assert run(tmp_path, LONGER, resume=True).trainer.step == 3
    found = find_start(tmp_path, LONGER, DATA.fingerprint, resume=True)
    assert found is not None
    assert found.path.name == "step-0000003"
    stop_after(tmp_path, 9, LONGER, resume=True)
    assert run(tmp_path, LONGER, resume=True).trainer.step == 9


def test_the_same_steps_continue_in_the_cooldown(tmp_path):
    run(tmp_path / "whole", COOLING).train()
    stop_after(tmp_path / "stopped", 4, COOLING)
    again = run(tmp_path / "stopped", COOLING, resume=True)
    assert again.trainer.step == 4
    again.train()
    assert files(tmp_path / "whole/checkpoints/step-0000005") == files(tmp_path / "stopped/checkpoints/step-0000005")


def test_a_run_that_cools_from_the_start_begins_again_for_more_steps(tmp_path):
    run(tmp_path, with_training(COOLING, cooldown=1.0)).train()
    assert find_start(tmp_path, with_training(LONGER, cooldown=1.0), DATA.fingerprint, resume=True) is None


def test_without_the_checkpoint_before_the_cooldown_more_steps_are_refused(tmp_path):
    run(tmp_path, COOLING).train()
    shutil.rmtree(tmp_path / "checkpoints/step-0000003")
    with pytest.raises(
        InputError, match=r"step-0000003 is missing or damaged: --steps 10 .*; put it back, .*--steps 5"
    ):
        find_start(tmp_path, LONGER, DATA.fingerprint, resume=True)
    found = find_start(tmp_path, COOLING, DATA.fingerprint, resume=True)
    assert found is not None
    assert found.step == 5


def test_grids_of_later_steps_than_the_start_are_removed(tmp_path):
    run(tmp_path, with_training(COOLING, sample_every=4)).train()
    run(tmp_path, with_training(LONGER, sample_every=4), resume=True)
    assert {path.name[:12] for path in (tmp_path / "samples").glob("step-*")} == {"step-0000000"}


def test_train_says_where_it_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ddpm_fast.launch.check_run", lambda *given: [])
    run(tmp_path, COOLING).train()
    train_config(LONGER, StartOptions(str(tmp_path), resume=True))
    assert (
        f"{tmp_path}: continuing at step 3, before the learning rate fell towards step 5\n" in capsys.readouterr().out
    )
    train_config(with_training(LONGER, steps=20), StartOptions(str(tmp_path), resume=True))
    assert "continuing at step 6, before the learning rate fell towards step 10\n" in capsys.readouterr().out
