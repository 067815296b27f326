"""What is continued, from where, and what is refused: a run is never restarted or changed by accident."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_fast.config import Config, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.launch import train_config
from ddpm_fast.options import StartOptions
from ddpm_fast.planning.start import starting_config
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.directory import check_resumable, read_config, read_metrics
from ddpm_fast.runs.lock import locked
from tests.runs.test_run import DATA, TINY, files, metrics, run


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check of the mathematics, which is other tests'."""
    monkeypatch.setattr("ddpm_fast.launch.check_run", lambda *given: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 3 and 6."""
    directory = tmp_path_factory.mktemp("finished")
    run(directory, TINY).train()
    return directory


@pytest.fixture
def trained(tmp_path: Path, finished: Path) -> Path:
    """A copy of it in another place."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resumed(out: Path, config: Config | None = None, resume_or_start: bool = False) -> None:
    start = StartOptions(str(out), not resume_or_start, resume_or_start)
    train_config(config or starting_config(None, start), start)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def remove_optimizer(step: Path) -> None:
    (step / "optimizer.safetensors").unlink()


def damage_ema(step: Path) -> None:
    flip_a_bit(step / "ema.safetensors")


def damage_state(step: Path) -> None:
    flip_a_bit(step / "state.json")


DAMAGES = [
    (remove_optimizer, "optimizer.safetensors is missing"),
    (damage_ema, "ema.safetensors: it is damaged"),
    (damage_state, "state.json"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_the_newest_whole_checkpoint_is_continued_and_what_is_passed_over_is_named(
    trained, finished, capsys, damage: Callable[[Path], None], named
):
    damage(trained / "checkpoints/step-0000006")
    resumed(trained)
    said = capsys.readouterr().out
    assert "passed over: " in said
    assert f"checkpoints/step-0000006/{named}" in said
    assert "continuing at step 3" in said
    assert files(trained / "checkpoints/step-0000006") == files(finished / "checkpoints/step-0000006")
    assert metrics(trained) == metrics(finished)


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_run_without_a_whole_checkpoint_is_refused_by_the_name_of_a_file_and_kept(trained, damage, named):
    for step in (3, 6):
        damage(checkpoint.path_of(trained, step))
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    for resume_or_start in (False, True):
        with pytest.raises(InputError, match=f"step-0000006/{named}"):
            resumed(trained, resume_or_start=resume_or_start)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_is_not_there_is_refused_and_named_and_nothing_is_made(tmp_path, there):
    out = tmp_path / "basee"
    if there:
        out.mkdir()
    for begin in (lambda: resumed(out), lambda: resumed(out, TINY)):
        with pytest.raises(InputError, match=r"basee (does not exist|holds no run): .*--resume-or-start"):
            begin()
    assert list(tmp_path.rglob("*")) == ([out] if there else [])


def test_a_job_script_starts_a_run_and_continues_it(tmp_path, finished, capsys):
    out = tmp_path / "run"
    resumed(out, with_training(TINY, steps=3), resume_or_start=True)
    assert "continuing" not in capsys.readouterr().out
    resumed(out, TINY, resume_or_start=True)
    assert "continuing at step 3" in capsys.readouterr().out
    place = "checkpoints/step-0000006"
    assert files(out / place) == files(finished / place)
    resumed(out, TINY, resume_or_start=True)
    assert "is finished: all 6 steps are done" in capsys.readouterr().out


def test_a_run_that_was_killed_before_it_was_one_can_be_started_again(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
    (tmp_path / ".config.12.tmp.json").write_text("{")
    resumed(tmp_path, with_training(TINY, steps=3), resume_or_start=True)
    assert checkpoint.steps_saved(tmp_path) == [3]
    assert list(tmp_path.glob(".*")) == []


def test_a_run_that_stopped_before_its_first_checkpoint_starts_at_step_0_and_says_so(tmp_path, finished, capsys):
    run(tmp_path)  # which has written its config.json, and trained nothing
    resumed(tmp_path)
    assert "stopped before its first checkpoint, starting at step 0" in capsys.readouterr().out
    assert files(tmp_path / "checkpoints/step-0000006") == files(finished / "checkpoints/step-0000006")


def test_a_damaged_line_of_the_metrics_costs_that_line_and_no_run(trained, finished):
    steps = [line["step"] for line in metrics(finished)]
    lines = (trained / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (trained / "metrics.jsonl").write_bytes(b"".join((lines[0].replace(b"loss", b"lo\xffs"), *lines[1:])))
    assert [line["step"] for line in read_metrics(trained)] == [line["step"] for line in map(json.loads, lines[1:])]
    resumed(trained, with_training(TINY, steps=8))
    assert [line["step"] for line in metrics(trained)][: len(steps) - 1] == steps[1:]


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_lost_configuration_is_taken_from_the_newest_checkpoint_and_mended(trained, finished, capsys, damage):
    file = trained / "config.json"
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:300])
    damage_state(trained / "checkpoints/step-0000006")
    resumed(trained)
    assert f"{file} is missing or torn: it is written anew" in capsys.readouterr().out
    assert read_config(trained) == read_config(finished)
    assert files(trained / "checkpoints/step-0000006") == files(finished / "checkpoints/step-0000006")


def test_flags_are_held_to_a_lost_configuration_too(trained):
    (trained / "config.json").unlink()
    with pytest.raises(InputError, match=r"--learning-rate 0.0002 -> 0.001"):
        resumed(trained, with_training(TINY, learning_rate=1e-3))


def test_a_torn_configuration_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is torn, and there is no checkpoint"):
        resumed(tmp_path)


CHANGED = {
    "log_every": 3,
    "save_every": 2,
    "save_minutes": 9.0,
    "keep_last": 2,
    "keep_every": 4,
    "sample_every": 5,
    "evaluate_every": 50,
    "evaluate_count": 7,
    "device": "auto",
    "precision": "fp32",
    "kernels": False,
    "compile": False,
    "capture": False,
    "deterministic": True,
    "steps": 8,
}


def test_what_changes_no_number_may_change(trained):
    config = replace(with_training(TINY, **CHANGED), checks=replace(TINY.checks, accept=("fit",), strict=True))
    assert all(getattr(TINY.training, name) != value for name, value in CHANGED.items())
    check_resumable(trained, config, DATA.fingerprint)


def test_what_changes_numbers_is_refused_by_name(trained):
    others = {"batch_size": 8, "accumulate": 2, "learning_rate": 1.0, "warmup_steps": 4, "cooldown": 0.5, "seed": 1}
    others |= {"adam_beta2": 0.9, "clip_norm": 2.0, "ema_decay": 0.5, "min_snr_gamma": 5.0}
    others |= {"timestep_density": "laplace", "init": "elsewhere", "label_dropout": 0.5}
    assert others.keys() | CHANGED.keys() == vars(TINY.training).keys()
    for name, value in others.items():
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} "):
            check_resumable(trained, with_training(TINY, **{name: value}), DATA.fingerprint)


def test_a_run_goes_on_elsewhere_with_its_data_elsewhere(tmp_path, monkeypatch):
    """The whole run in one directory; another one stopped, copied, continued from a third, with the data renamed."""
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    np.save(here / "images.npy", images)
    config = replace(TINY, data=replace(TINY.data, data="images.npy"))
    monkeypatch.chdir(here)
    for name, steps in (("whole", 6), ("stopped", 3)):
        resumed(Path(name), with_training(config, steps=steps), resume_or_start=True)
    shutil.copytree("stopped", there / "moved")
    shutil.copytree("stopped", there / "followed")
    monkeypatch.chdir(there)

    def go_on(name: str, data: str = "") -> None:
        start = StartOptions(name, resume=True)
        found = starting_config(None, start)
        found = replace(found, data=replace(found.data, data=data)) if data else found
        train_config(with_training(found, steps=6), start)

    go_on("followed")  # the data is where it was
    (here / "images.npy").rename(here / "renamed.npy")
    with pytest.raises(InputError, match=r"images.npy does not exist"):
        go_on("moved")
    np.save("other.npy", images + 1)
    with pytest.raises(InputError, match=r"trained on other data .* name that by --data"):
        go_on("moved", "other.npy")
    go_on("moved", str(here / "renamed.npy"))
    for name in ("followed", "moved"):
        for part in checkpoint.TENSOR_FILES:
            file = f"checkpoints/step-0000006/{part}.safetensors"
            assert (there / name / file).read_bytes() == (here / "whole" / file).read_bytes()


def test_a_second_run_is_refused_before_any_work_and_says_whose_the_directory_is(trained, monkeypatch):
    monkeypatch.setattr("ddpm_fast.launch.open_dataset", lambda *given: pytest.fail("the data was opened"))
    before = files(trained / "checkpoints/step-0000006")
    with locked(trained), pytest.raises(InputError, match=r"run is being trained by process \d+ on .*: wait until"):
        resumed(trained)
    assert files(trained / "checkpoints/step-0000006") == before
    monkeypatch.setattr("ddpm_fast.launch.open_dataset", open_dataset)
    resumed(trained)


HOLD = "import sys, time; from pathlib import Path; from ddpm_fast.runs.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_process_that_is_killed_leaves_no_lock(tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on "), locked(out):
            pass
        holder.kill()
    assert (out / ".lock").exists()
    with locked(out):
        pass
    assert not (out / ".lock").exists()


def test_a_directory_that_was_made_for_nothing_is_taken_away_again(tmp_path):
    with pytest.raises(InputError, match="no-such-folder"):
        train_config(replace(TINY, data=replace(TINY.data, data="no-such-folder")), StartOptions(str(tmp_path / "run")))
    assert list(tmp_path.iterdir()) == []


def test_no_clock_and_no_time_of_a_file_decides_anything(trained, monkeypatch, finished):
    """The newest checkpoint has the oldest files, and the system's clock goes backwards."""
    for age, step in enumerate((3, 6)):
        for file in checkpoint.path_of(trained, step).iterdir():
            seconds = 1e9 - 1e6 * age
            os.utime(file, (seconds, seconds))
    ticks = iter(range(10**9, 0, -60))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    assert checkpoint.resolve(trained).step == 6
    resumed(trained, with_training(TINY, steps=8))
    assert json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8
