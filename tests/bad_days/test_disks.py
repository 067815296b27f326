"""Disks that are full or read-only, for real: each writer says so in one line, and a run then goes on as if never."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tyro")
from ddpm_fast.cli import main as cli
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.directory import find_start, read_metrics
from ddpm_fast.runs.run import Run

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(data="digits"),
    training=TrainingConfig(
        steps=8, batch_size=4, log_every=100, save_every=2, sample_every=0, device="cpu"
    ),
)  # fmt: skip
DATA = open_dataset(TINY.data, TINY.unet)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    """Leave no byte free."""
    with (place / "filler").open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def run(directory: Path, **training: int) -> Run:
    config = with_training(TINY, **training)
    found = find_start(directory, config, DATA.fingerprint, resume=(directory / "config.json").exists())
    return Run(directory, config, DATA, found, progress=False)


def fill_at(running: Run, step: int, place: Path) -> None:
    """Fill the disk once a step is taken, and its predecessors' checkpoints are written."""
    take_step = running.trainer.train_step_no_sync

    def step_and_fill() -> None:
        take_step()
        if running.trainer.step == step:
            running.saver.wait()
            fill(place)

    running.trainer.train_step_no_sync = step_and_fill


def hidden(place: Path) -> list[Path]:
    return [path for path in place.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize(
    ("training", "evaluates", "names"),
    [
        pytest.param({"log_every": 3}, False, "metrics.jsonl", marks=pytest.mark.slow),
        ({"save_every": 1}, False, "checkpoints"),
        pytest.param({}, True, "evaluation|run: ", marks=pytest.mark.slow),
        ({"sample_every": 3}, False, "samples"),
    ],
    ids=["metrics", "checkpoint", "evaluation", "preview"],
)
def test_a_disk_that_fills_while_a_run_trains(disk, monkeypatch, training, evaluates, names):
    monkeypatch.setattr("ddpm_fast.runs.run.is_due", lambda step, config: evaluates and step == 3)
    running = run(disk / "run", **training)
    fill_at(running, 3, disk)
    with pytest.raises(InputError, match=rf"cannot write \S*({names})\S*.*No space left on device; free some space"):
        running.train()
    running.saver.__exit__(None)
    assert hidden(disk) == []
    found = checkpoint.newest(disk / "run")
    assert found is not None
    assert found.step == 2
    found.verify()
    (disk / "filler").unlink()
    run(disk / "run", **training).train()
    found = checkpoint.newest(disk / "run")
    assert found is not None
    assert found.step == 8
    steps = [line["step"] for line in read_metrics(disk / "run")]
    assert steps == sorted(set(steps))


def test_a_disk_that_is_full_when_a_run_begins(disk):
    fill(disk)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        run(disk / "run")
    assert hidden(disk) == []


def test_a_disk_that_is_full_when_the_code_is_kept(disk):
    running = run(disk / "run")
    fill(disk)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        running.train()
    assert hidden(disk) == []


def test_a_disk_that_only_tensorboard_finds_full(disk, capsys):
    """Its file lies open in a thread of its own, which must end no run: metrics.jsonl has the same."""
    running = run(disk / "run", log_every=1, save_every=8)
    take_step = running.trainer.train_step_no_sync

    def step() -> None:
        if running.trainer.step in (3, 4):
            (disk / "filler").unlink(missing_ok=True)
            fill(disk) if running.trainer.step == 3 else None
            running.board.add_images("noise", torch.rand(1, 3, 128, 128), running.trainer.step)
            running.board.flush()
        take_step()

    running.trainer.train_step_no_sync = step
    running.train()
    assert capsys.readouterr().out.count(f"{disk}/run/tensorboard is written no more: No space left on device") == 1
    assert checkpoint.path_of(disk / "run", 8).exists()


def test_a_cache_that_is_full(disk, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "photos/1.png")
    fill(disk)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device; .* XDG_CACHE_HOME"):
        open_dataset(DataConfig(data=str(tmp_path / "photos")), TINY.unet)
    assert hidden(disk) == []


def test_samples_that_fill_a_disk_are_whole_and_the_rest_follows(disk, tmp_path, capsys):
    run(tmp_path / "run", steps=2).train()
    fill(disk)
    sample = ["sample", str(tmp_path / "run"), "-n", "4", "--sampler", "ddim", "--steps", "2", "--out", str(disk / "s")]
    for_all: Callable[[], int] = lambda: cli.run([*sample, "--device", "cpu"])  # noqa: E731
    assert for_all() == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert hidden(disk) == []
    (disk / "filler").unlink()
    assert for_all() == 0
    assert len(list((disk / "s").glob("00*.png"))) == 4


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_disk_that_is_read_only_is_said_before_the_work(disk, tmp_path, capsys, monkeypatch, command):
    run(tmp_path / "run", steps=2).train()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    monkeypatch.setattr("ddpm_fast.launch.check_run", lambda *a: pytest.fail("checked before"))
    flags = ["--device", "cpu", "--out", str(disk / "run")]
    assert cli.run([command, *([str(tmp_path / "run")] if command == "sample" else []), *flags]) == 2
    assert f"cannot write {disk}/run: Read-only file system" in capsys.readouterr().err
