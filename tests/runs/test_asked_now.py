"""SIGUSR1: a checkpoint and a grid at once, and not a number of the run is another for it, stopped or not."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.errors import MathematicsError
from ddpm_fast.runs.directory import find_start, read_metrics
from ddpm_fast.runs.previews import Previews
from ddpm_fast.runs.run import Run
from ddpm_fast.runs.signals import Signals

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")

CONFIG = Config(
    unet=UNetConfig(
        1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4, dropout=0.3
    ),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(data="digits", flip=True),
    training=TrainingConfig(steps=12, batch_size=4, log_every=4, save_every=12, sample_every=12, device="cpu"),
)
DATA = open_dataset(CONFIG.data, CONFIG.unet)


def run(directory: Path, config: Config = CONFIG, resume: bool = False) -> Run:
    return Run(directory, config, DATA, find_start(directory, config, DATA.fingerprint, resume), progress=False)


def ask_after(running: Run, *steps: int) -> None:
    """Have SIGUSR1 arrive in the midst of some steps."""
    take_step = running.trainer.train_step_no_sync

    def step_and_ask() -> None:
        if running.trainer.step + 1 in steps:
            os.kill(os.getpid(), signal.SIGUSR1)
        take_step()

    running.trainer.train_step_no_sync = step_and_ask


def numbers(directory: Path, step: int) -> dict[str, Any]:
    """All that a run computed: a checkpoint's bytes, the evaluations', the metrics but for times."""
    files = [*(directory / f"checkpoints/step-{step:07d}").iterdir(), *(directory / "evaluation").iterdir()]
    metrics = [{name: value for name, value in line.items() if name != "wall"} for line in read_metrics(directory)]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files} | {"metrics": metrics}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run(directory).train()
    return directory


def test_it_saves_and_draws_at_once_and_changes_no_number(undisturbed, tmp_path, capsys):
    asked = run(tmp_path / "run")
    ask_after(asked, 3, 8, 12)
    asked.train()
    out = capsys.readouterr().out
    for step in (3, 8, 12):
        assert f"step {step}: saved and drawn, see {tmp_path}/run/samples, as SIGUSR1 asked\n" in out
    steps = {path.name for path in (tmp_path / "run/checkpoints").glob("step-*")}
    assert steps == {"step-0000003", "step-0000008", "step-0000012"}
    grids = {path.name for path in (tmp_path / "run/samples").glob("*_raw.png")}
    assert grids == {f"step-{step:07d}_raw.png" for step in (0, 3, 8, 10, 12)}
    assert numbers(tmp_path / "run", 12) == numbers(undisturbed, 12)


@pytest.mark.parametrize("step", [3, 8])
def test_a_run_killed_after_it_continues_to_the_bit(undisturbed, tmp_path, step):
    asked = run(tmp_path / "run")
    ask_after(asked, step)
    asked.train()
    shutil.rmtree(tmp_path / "run/checkpoints/step-0000012")  # as if it had been killed between
    again = run(tmp_path / "run", resume=True)
    assert again.trainer.step == step
    again.train()
    assert numbers(tmp_path / "run", 12) == numbers(undisturbed, 12)


def test_where_no_grid_is_wanted_one_is_drawn_for_who_asks(tmp_path, monkeypatch, capsys):
    def broken(previews: Previews, count: int):
        raise MathematicsError("not finite")

    asked = run(tmp_path / "run", with_training(CONFIG, steps=3, sample_every=0))
    ask_after(asked, 2)
    asked.train()
    assert [path.name for path in (tmp_path / "run/samples").glob("*_raw.png")] == ["step-0000002_raw.png"]
    monkeypatch.setattr(Previews, "draw", broken)
    asked = run(tmp_path / "broken", with_training(CONFIG, steps=3, sample_every=0))
    ask_after(asked, 2)
    asked.train()
    out = capsys.readouterr().out
    assert "step 2: no grid was drawn: not finite\n" in out
    assert "step 2: saved, as SIGUSR1 asked\n" in out


def test_it_ends_nothing_and_is_remembered_once():
    before = signal.getsignal(signal.SIGUSR1)
    with Signals() as signals:
        assert not signals.asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked()
        assert not signals.asked()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_what_is_asked_before_training_is_done_after_its_first_step(undisturbed, tmp_path, capsys):
    with Signals():  # the command's, during the checks
        os.kill(os.getpid(), signal.SIGUSR1)
        run(tmp_path / "run").train()
    out = capsys.readouterr().out
    assert "SIGUSR1 came before training: the next step is saved and drawn\n" in out
    assert out.count("step 1: saved and drawn, see ") == out.count("as SIGUSR1 asked") == 1
    assert (tmp_path / "run/checkpoints/step-0000001").is_dir()
    assert numbers(tmp_path / "run", 12) == numbers(undisturbed, 12)
