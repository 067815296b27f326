"""A training run: exact resume, honest interruption, and a stop at the first value that is not finite."""

import itertools
import json
import os
import pkgutil
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.errors import InputError, MathematicsError
from ddpm_fast.ops.reference import ema_decay_at, learning_rate_at
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.directory import check_resumable, find_start
from ddpm_fast.runs.run import Run
from ddpm_fast.runs.signals import InterruptedRunError

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(data="digits", flip=True),
    training=TrainingConfig(
        steps=6, batch_size=4, warmup_steps=3, log_every=2, save_every=3, sample_every=0, device="cpu"
    ),
)
DATA = open_dataset(TINY.data, TINY.unet)


def run(directory: Path, config: Config = TINY, resume: bool = False) -> Run:
    return Run(directory, config, DATA, find_start(directory, config, DATA.fingerprint, resume), progress=False)


def files(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in sorted(path.iterdir())}


def metrics(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "wall"} for line in lines]


def signal_after(running: Run, step: int, number: int) -> None:
    """Have a signal arrive during a step of a run."""
    take_step = running.trainer.train_step_no_sync

    def step_and_signal() -> None:
        take_step()
        if running.trainer.step == step:
            os.kill(os.getpid(), number)

    running.trainer.train_step_no_sync = step_and_signal


def test_a_run_leaves_what_the_readme_says(tmp_path):
    run(tmp_path / "run", with_training(TINY, sample_every=6)).train()
    names = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "evaluation", "origin", "samples", "checkpoints", "tensorboard"}
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2, 4, 6]
    pictures = sorted(entry.name for entry in (tmp_path / "run/samples").iterdir())
    assert pictures[-2:] == ["step-0000006_normalized.png", "step-0000006_raw.png"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-0000006\n"


def test_resuming_gives_the_same_bytes_as_never_stopping(tmp_path):
    whole = replace(TINY, unet=replace(TINY.unet, dropout=0.3))
    run(tmp_path / "whole", whole).train()
    stopped = run(tmp_path / "stopped", whole)
    signal_after(stopped, 3, signal.SIGTERM)
    with pytest.raises(InterruptedRunError):
        stopped.train()
    run(tmp_path / "stopped", whole, resume=True).train()
    for name in ("model", "ema", "optimizer"):
        file = f"checkpoints/step-0000006/{name}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes(), name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")
    assert files(tmp_path / "whole/evaluation") == files(tmp_path / "stopped/evaluation")


def test_two_equal_runs_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name).train()
    assert files(tmp_path / "a/checkpoints/step-0000003") == files(tmp_path / "b/checkpoints/step-0000003")


def test_resume_cuts_metrics_back_to_the_checkpoint(tmp_path):
    run(tmp_path).train()
    shutil.rmtree(tmp_path / "checkpoints/step-0000006")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    run(tmp_path, resume=True)
    assert [line["step"] for line in metrics(tmp_path)] == [2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path, number):
    running = run(tmp_path, with_training(TINY, steps=1000, save_every=1000))
    signal_after(running, 5, number)
    with pytest.raises(InterruptedRunError, match=r"saved step 5; .* --resume") as interrupted:
        running.train()
    assert interrupted.value.exit_status == 128 + number
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 5


def signal_when_called(monkeypatch: pytest.MonkeyPatch, name: str, call: int = 1) -> None:
    """Have a signal arrive when a function is called for the first time, or the call-th."""
    function, calls = pkgutil.resolve_name(name), itertools.count(1)

    def signal_then_call(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **keywords)

    monkeypatch.setattr(name, signal_then_call)


def test_no_grid_is_drawn_where_none_is_asked_for(tmp_path):
    run(tmp_path).train()
    assert [entry.name for entry in (tmp_path / "samples").iterdir()] == ["data.png"]


TWELVE = with_training(TINY, steps=12, sample_every=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    run(directory, TWELVE).train()
    return directory


@pytest.mark.parametrize(
    ("what", "call", "saved"),
    [
        ("ddpm_fast.engine.buffers.normal", 2, 6),  # in the grid after step 6, the second
        ("ddpm_fast.engine.trainer.random_timesteps", 5, 4),  # in the pass through the network of step 5
        ("ddpm_fast.ops.reference.learning_rate_at", 5, 5),  # in its update of the weights, which is finished
        ("ddpm_fast.engine.trainer.Trainer.read_loss", 2, 4),  # in the line for step 4, which is finished
    ],
)
def test_a_signal_is_obeyed_at_once_and_the_finished_steps_are_kept(tmp_path, monkeypatch, whole, what, call, saved):
    with monkeypatch.context() as patches:
        signal_when_called(patches, what, call)
        with pytest.raises(InterruptedRunError, match=f"SIGTERM: saved step {saved};"):
            run(tmp_path, TWELVE).train()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == saved
    assert list(tmp_path.rglob(".*")) == []
    run(tmp_path, TWELVE, resume=True).train()
    for place in ("checkpoints/step-0000012", "evaluation", "samples"):
        assert files(whole / place) == files(tmp_path / place)
    assert metrics(whole) == metrics(tmp_path)


def test_an_evaluation_that_is_interrupted_is_made_when_the_run_goes_on(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patches:
        signal_when_called(patches, "ddpm_fast.runs.evaluation.sampling_copy")
        with pytest.raises(InterruptedRunError, match="SIGTERM: saved step 12; continue by"):
            run(tmp_path, TWELVE).train()
    run(tmp_path, TWELVE, resume=True).train()
    assert files(whole / "checkpoints/step-0000012") == files(tmp_path / "checkpoints/step-0000012")
    assert files(whole / "evaluation") == files(tmp_path / "evaluation")
    assert metrics(tmp_path) == metrics(whole)


@pytest.mark.parametrize("what", ["ddpm_fast.engine.trainer.random_timesteps", "ddpm_fast.runs.origin.describe"])
def test_a_signal_before_the_first_step_says_so(tmp_path, monkeypatch, what):
    signal_when_called(monkeypatch, what)
    with pytest.raises(InterruptedRunError, match=r"before the first step; continue by .* --resume"):
        run(tmp_path).train()
    assert checkpoint.newest(tmp_path) is None


def test_the_first_bad_step_is_masked_named_and_stops_the_run(tmp_path):
    running = run(tmp_path, with_training(TINY, steps=8, save_every=2))
    trainer = running.trainer
    for _ in range(2):
        trainer.train_step_no_sync()
    running.save()
    batch = trainer.batch

    def return_nan(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan  # and not a new tensor: the graph must go on behind it

    def break_the_weights(first: int, n: int):
        if first >= 3 * n:  # from step 3 on, conv_in returns NaN
            trainer.unet.conv_in.register_forward_hook(return_nan)
        return batch(first, n)

    trainer.batch = break_the_weights
    with pytest.raises(MathematicsError, match=r"step 3: the output of conv_in is not finite; .*step-0000002"):
        running.train()
    assert all(bool(torch.isfinite(p).all()) for p in trainer.parameters.values())
    assert all(bool(torch.isfinite(p).all()) for p in trainer.ema.values())


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 8}, {"learning_rate": 1e-3}])
def test_a_changed_flag_is_refused_by_name(tmp_path, change):
    run(tmp_path)
    name = next(iter(change)).replace("_", "-")
    with pytest.raises(InputError, match=f"--{name} "):
        check_resumable(tmp_path, with_training(TINY, **change), DATA.fingerprint)
    check_resumable(tmp_path, with_training(TINY, steps=60), DATA.fingerprint)
    with pytest.raises(InputError, match="other data"):
        check_resumable(tmp_path, TINY, "another")
    with pytest.raises(InputError, match="as many or more"):
        check_resumable(tmp_path, with_training(TINY, steps=2), DATA.fingerprint)


def test_an_out_that_holds_anything_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="--resume"):
        find_start(tmp_path, TINY, DATA.fingerprint, resume=False)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_accumulation_gives_the_same_step():
    def weights(parts: int) -> torch.Tensor:
        trainer = Trainer(with_training(TINY, accumulate=parts), Batches.batch, torch.device("cpu"))
        trainer.train_step_no_sync()
        return torch.cat([p.detach().flatten() for p in trainer.parameters.values()])

    torch.testing.assert_close(weights(1), weights(4), rtol=0, atol=1e-6)


class Batches:
    """The first digits, in order."""

    @staticmethod
    def batch(first: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(DATA.images[first : first + n]).permute(0, 3, 1, 2), torch.arange(first, first + n)


def test_a_step_is_adam_with_clipping_warm_up_and_ema():
    """One step against torch's plain Adam in float64, on gradients clipped by the textbook."""
    trainer = Trainer(with_training(TINY, clip_norm=0.01), Batches.batch, torch.device("cpu"))
    trainer.load_batch()
    trainer.backward()
    truth = [p.detach().double().clone().requires_grad_() for p in trainer.parameters.values()]
    before = [p.detach().clone() for p in truth]
    for parameter, gradient in zip(truth, trainer.gradients.values(), strict=True):
        parameter.grad = gradient.double()
    torch.nn.utils.clip_grad_norm_(truth, 0.01)
    training = trainer.config.training
    settings = training.learning_rate, training.warmup_steps, training.steps, training.cooldown_steps
    rate = float(learning_rate_at(torch.tensor(0), *settings))
    torch.optim.Adam(truth, lr=rate).step()
    trainer.train_step_no_sync()
    decay = float(ema_decay_at(torch.tensor(0), training.ema_decay))
    for old, new, p, average in zip(before, truth, trainer.parameters.values(), trainer.ema.values(), strict=True):
        # Adam's first step divides a gradient by its own size: near zero, rounding decides.
        torch.testing.assert_close(p.double(), new, rtol=0, atol=2e-6)
        torch.testing.assert_close(average.double(), decay * old + (1 - decay) * p.double(), rtol=0, atol=1e-7)


def test_warm_ups():
    assert learning_rate_at(torch.tensor([0, 1, 3, 4, 100]), 1.0, 4, 9, 0).tolist() == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert ema_decay_at(torch.tensor([0, 8, 10**6]), 0.99).tolist() == [0.1, 0.5, 0.99]


def test_a_second_signal_in_an_update_saves_no_half_updated_weights(tmp_path, monkeypatch):
    running = run(tmp_path, with_training(TINY, steps=1000))
    function, calls = pkgutil.resolve_name("ddpm_fast.ops.reference.ema_decay_at"), itertools.count(1)

    def signal_twice(*arguments: Any) -> Any:  # after Adam has moved the weights, before their average follows
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments)

    monkeypatch.setattr("ddpm_fast.ops.reference.ema_decay_at", signal_twice)
    with pytest.raises(InterruptedRunError, match=r"SIGINT: interrupted in an update; the newest .*step-0000003;"):
        running.train()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-0000003"]
