"""Checkpoints in the background: training goes on, nothing is half written, and what goes wrong is said."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddpm_fast.config import TrainingConfig, with_training
from ddpm_fast.errors import InputError
from ddpm_fast.runs import checkpoint, retention
from ddpm_fast.runs.saver import LARGE, Saver, Snapshot
from ddpm_fast.runs.signals import InterruptedRunError
from tests.runs.test_run import DATA, TINY, files, metrics, run, signal_after

TWELVE = with_training(TINY, steps=12)


def saved_steps(directory: Path) -> list[int]:
    """Return the steps of a run's checkpoints, all of them whole, and nothing else beside them."""
    steps = checkpoint.steps_saved(directory)
    for step in steps:
        checkpoint.read(checkpoint.path_of(directory, step)).verify()
    names = {entry.name for entry in (directory / "checkpoints").iterdir()}
    assert names == {"latest", *(f"step-{step:07d}" for step in steps)}
    return steps


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let no file of a checkpoint be written until this is set."""
    gate, write = threading.Event(), checkpoint.write_synced

    def write_when_open(path: Path, data: bytes) -> None:
        assert gate.wait(60)
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_synced", write_when_open)
    return gate


def open_after(running, step: int, gate: threading.Event) -> None:
    take_step = running.trainer.train_step_no_sync

    def step_and_open() -> None:
        take_step()
        if running.trainer.step == step:
            gate.set()

    running.trainer.train_step_no_sync = step_and_open


def test_training_goes_on_while_a_checkpoint_of_its_step_is_written(tmp_path, gate):
    running = run(tmp_path / "late", TWELVE)
    open_after(running, 5, gate)  # two steps after the one that is saved
    running.train()
    run(tmp_path / "whole", TWELVE).train()
    assert saved_steps(tmp_path / "late") == [12, 9, 6, 3]
    for step in (3, 12):
        place = f"checkpoints/step-{step:07d}"
        assert files(tmp_path / "late" / place) == files(tmp_path / "whole" / place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_checkpoint_is_written_loses_neither_it_nor_what_was_done_since(tmp_path, gate, number):
    running = run(tmp_path, TWELVE)
    open_after(running, 5, gate)
    signal_after(running, 5, number)
    with pytest.raises(InterruptedRunError, match="saved step 5;"):
        running.train()
    assert saved_steps(tmp_path) == [5, 3]


def test_a_second_signal_ends_the_wait_and_what_was_begun_becomes_whole(tmp_path, gate):
    running = run(tmp_path, TWELVE)
    signal_after(running, 5, signal.SIGINT)
    again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    again.start()
    with pytest.raises(InterruptedRunError, match=r"interrupted while saving; the newest checkpoint is none;"):
        running.train()
    again.join()
    gate.set()
    running.saver._worker.shutdown(wait=True)  # as the process does before it ends
    assert saved_steps(tmp_path) == [3]


def test_a_full_disk_ends_the_run_at_its_next_step(tmp_path, monkeypatch):
    running = run(tmp_path, with_training(TWELVE, steps=100_000, log_every=100_000))

    def fail(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", fail)
    with pytest.raises(InputError, match=r"cannot write .*step-0000003: No space left on device; free some space"):
        running.train()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_disk_that_is_full_at_the_end_is_said_too(tmp_path, monkeypatch):
    running = run(tmp_path, with_training(TINY, steps=2))

    def fail(path: Path, data: bytes) -> None:
        time.sleep(0.1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", fail)
    with pytest.raises(InputError, match="No space left"):
        running.train()


def test_a_snapshot_is_the_state_as_it_was_in_its_layout_and_reuses_its_memory():
    flat = torch.randn(LARGE)
    state = {
        "a": {"w": flat.as_strided((4, 3, 5, 5), (75, 1, 15, 3), 64), "all": flat, "few": torch.arange(3)},
        "b": {"tail": flat[-7:], "scalar": torch.tensor(2.5, dtype=torch.float64), "none": torch.zeros(0)},
    }
    before = {part: {name: tensor.clone() for name, tensor in tensors.items()} for part, tensors in state.items()}
    snapshot = Snapshot()
    taken = snapshot.take(state)
    flat.zero_()
    for part, tensors in before.items():
        for name, tensor in tensors.items():
            assert torch.equal(taken[part][name], tensor), name
            assert taken[part][name].stride() == state[part][name].stride()
    first = taken["a"]["all"].data_ptr()
    again = snapshot.take(state)
    assert again["a"]["all"].data_ptr() == again["b"]["tail"].data_ptr() - 4 * (LARGE - 7) == first
    assert not again["a"]["all"].any()


def test_minutes_between_checkpoints_change_no_number(tmp_path, clock):
    """A clock that does not move, and one on which every step takes a minute."""
    config = with_training(TINY, steps=7, save_every=100, save_minutes=2.0, log_every=2)
    run(tmp_path / "still", config).train()
    assert saved_steps(tmp_path / "still") == [7]
    moving = run(tmp_path / "moving", config)
    take_step = moving.trainer.train_step_no_sync

    def step_of_a_minute() -> None:
        take_step()
        clock.seconds += 60

    moving.trainer.train_step_no_sync = step_of_a_minute
    moving.train()
    assert saved_steps(tmp_path / "moving") == [7, 6, 4, 2]
    assert metrics(tmp_path / "still") == metrics(tmp_path / "moving")
    for part in checkpoint.TENSOR_FILES:
        file = f"checkpoints/step-0000007/{part}.safetensors"
        assert (tmp_path / "still" / file).read_bytes() == (tmp_path / "moving" / file).read_bytes()


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "cooldown", "kept"),
    [
        (0, 0, 0.0, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
        (1, 0, 0.0, [10]),
        (3, 0, 0.0, [10, 9, 8]),
        (2, 4, 0.0, [10, 9, 8, 4]),
        (2, 0, 0.5, [10, 9, 5]),
        (2, 3, 0.5, [10, 9, 6, 5, 3]),
    ],
)
def test_what_is_kept(tmp_path, keep_last, keep_every, cooldown, kept):
    config = with_training(TINY, steps=10, keep_last=keep_last, keep_every=keep_every, cooldown=cooldown)
    parts = {part: {"a": torch.zeros(2)} for part in checkpoint.TENSOR_FILES}
    with Saver(tmp_path, config, DATA.fingerprint) as saver:
        for step in range(1, 11):
            saver.save(step, parts)
    assert saved_steps(tmp_path) == kept


def test_a_damaged_checkpoint_is_neither_counted_nor_deleted(tmp_path):
    config = with_training(TINY, steps=10, keep_last=2)
    parts = {part: {"a": torch.zeros(2)} for part in checkpoint.TENSOR_FILES}
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, config, "", parts)
    (tmp_path / "checkpoints/step-0000002/ema.safetensors").unlink()
    retention.delete_superseded(tmp_path, config.training, 3)
    assert checkpoint.steps_saved(tmp_path) == [3, 2, 1]
    checkpoint.save(tmp_path, 4, config, "", parts)
    retention.delete_superseded(tmp_path, config.training, 4)
    assert checkpoint.steps_saved(tmp_path) == [4, 3, 2]


def test_a_checkpoint_is_about_as_large_as_it_is_said_to_be(tmp_path):
    running = run(tmp_path / "run", TINY)
    running.train()
    size = sum(file.stat().st_size for file in (tmp_path / "run/checkpoints/step-0000006").glob("*.safetensors"))
    headers = 120 * len(running.trainer.parameters) * 5  # a name, a shape and a place each
    assert 0 < size - retention.checkpoint_bytes(TINY) < headers


def test_the_checkpoints_to_come_are_counted():
    training = TrainingConfig(steps=10, save_every=3, cooldown=0.5)
    assert retention.checkpoints_to_come(training, 0) == len({3, 5, 6, 9, 10})
    assert retention.checkpoints_to_come(training, 5) == len({6, 9, 10})
    assert retention.checkpoints_to_come(TrainingConfig(steps=1000, save_every=1, keep_last=4), 0) == 6


@pytest.mark.parametrize(("free", "said"), [(0.9, None), (1.1, "warning: 2 checkpoints to come take"), (2.1, "")])
def test_too_little_space_is_said_before_the_first_step(tmp_path, monkeypatch, free, said):
    usage = SimpleNamespace(free=int(free * retention.checkpoint_bytes(TINY)))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    if said is None:
        with pytest.raises(InputError, match=r"a checkpoint takes .* MB, but .* left: free some space"):
            retention.require_space(tmp_path, TINY, 0)
    else:
        assert retention.require_space(tmp_path, TINY, 0).startswith(said)
        assert bool(said) == bool(retention.require_space(tmp_path, TINY, 0))
