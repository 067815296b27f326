"""Numerical guards: each fault is planted in a run of a tiny network, and stops it or is said once."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.errors import MathematicsError
from ddpm_fast.runs import evaluation, guards
from ddpm_fast.runs.guards import rises, times_the_best
from ddpm_fast.runs.run import Run

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(data="digits"),
    training=TrainingConfig(
        steps=20, batch_size=4, learning_rate=1e-3, warmup_steps=0, log_every=1, save_every=4, sample_every=0,
        device="cpu", ema_decay=0.5,
    ),
)  # fmt: skip
DATA = open_dataset(TINY.data, TINY.unet)


def run(directory: Path, **training: object) -> Run:
    return Run(directory, with_training(TINY, **training), DATA, None, progress=False)


def before_step(running: Run, first: int, fault: Callable[[], object]) -> None:
    """Plant a fault before each step from one on."""
    take_step = running.trainer.train_step_no_sync

    def broken_step() -> None:
        if running.trainer.step >= first:
            fault()
        take_step()

    running.trainer.train_step_no_sync = broken_step


def plant_in_the_input(running: Run) -> None:
    ops = running.trainer.flat.network.ops
    running.trainer.unet.ops = replace(ops, q_sample=lambda *a, **k: ops.q_sample(*a, **k) * torch.nan)


def plant_in_a_weight(running: Run) -> None:
    with torch.no_grad():
        running.trainer.parameters["mid_block.resnets.1.conv2.weight"][0, 0, 0, 0] = torch.nan


def plant_in_a_gradient(running: Run, times: float = math.inf) -> None:
    running.trainer.parameters["conv_in.weight"].register_hook(lambda gradient: gradient * times)


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        (plant_in_the_input, "x_t, which the network reads,"),
        (plant_in_a_weight, "the output of mid_block.resnets.1.conv2"),
        (plant_in_a_gradient, "the gradient of conv_in.weight"),
        (lambda running: plant_in_a_gradient(running, 1e23), "the norm of the gradient"),
    ],
)
def test_the_first_value_that_is_not_finite_stops_the_run_by_its_place(tmp_path, plant, where):
    running = run(tmp_path)
    before_step(running, 5, lambda: plant(running) if running.trainer.step == 5 else None)
    sentence = rf"^step 5: {where} is not finite; the last good checkpoint is .*step-0000004\. Try a lower --learning"
    with pytest.raises(MathematicsError, match=sentence) as stopped:
        running.train()
    assert "fp32" not in str(stopped.value)  # which it is
    assert running.trainer.numbers.updates == 5


def test_what_is_finite_when_taken_again_is_not_blamed_on_a_layer(tmp_path):
    running = run(tmp_path)
    before_step(running, 5, lambda: running.trainer.numbers.bad_step.fill_(5))
    with pytest.raises(MathematicsError, match=r"taken again .* --no-compile, --no-capture"):
        running.train()


def scale_the_output(running: Run, times: float) -> None:
    with torch.no_grad():
        for weights in (running.trainer.parameters, running.trainer.ema):
            weights["conv_out.weight"].mul_(times).add_(0.02 * (times - 1))


def test_a_run_that_diverges_stops_and_names_what_to_go_back_to(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_fast.runs.run.is_due", lambda step, config: step % 2 == 0)
    monkeypatch.setattr(evaluation, "EARLY_ADDRESSES", 32)
    monkeypatch.setattr(guards, "EARLY_STEPS", 0)
    running = run(tmp_path)
    before_step(running, 8, lambda: scale_the_output(running, 1.7))
    with pytest.raises(MathematicsError, match=r"the run diverges: the evaluation loss rose 3 times") as stopped:
        running.train()
    known = {step: _mean(tmp_path, step) for step in evaluation.evaluated_steps(tmp_path)}
    best, last = min(known, key=lambda step: known[step]), max(known)
    assert 10 < last < 20
    assert known[last] > 2 * known[best]
    assert f"step {last}: the run diverges" in str(stopped.value)
    assert f"its best, {known[best]:.4f} of step {best};" in str(stopped.value)
    turned = max(step for step in (4, 8, 12, 16) if step <= last - 6)
    assert f"the last checkpoint before it is {tmp_path}/checkpoints/step-{turned:07d}. Try a" in str(stopped.value)


def _mean(directory: Path, step: int) -> float:
    found = evaluation.read(directory, step)
    assert found is not None
    return float(found.errors["ema"].double().mean())


class Watch:
    """The guards of a run whose evaluations and log lines are made up."""

    def __init__(self, directory: Path) -> None:
        self.running = run(directory)
        self.guards, self.directory = self.running.guards, directory

    def evaluate(self, steps: list[int], heights: list[float], **others: list[float]) -> None:
        """Have errors of about these heights, with the same chance in all."""
        noise = torch.rand(128, generator=torch.Generator().manual_seed(0))
        for i, step in enumerate(steps):
            errors = {name: noise + values[i] for name, values in (others | {"ema": heights, "raw": heights}).items()}
            found = evaluation.Evaluation(errors, torch.arange(128), torch.zeros(128))
            self.running.trainer.step = step
            evaluation.write(self.directory, step, found)
            self.guards.look_at_evaluation(found)

    def log(self, losses: list[float], gradient_norms: list[float] | None = None) -> None:
        for loss, norm in zip(losses, gradient_norms or [1.0] * len(losses), strict=True):
            self.running.trainer.step += 1
            self.guards.look_at_log({"loss": loss, "gradient_norm": norm})


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


def test_a_divergence_is_seen_by_a_run_that_was_resumed(watch):
    watch.evaluate([100, 200, 300], [0.0, 0.2, 0.4])
    watch.guards = guards.Guards(TINY, watch.directory, watch.running.trainer)
    with pytest.raises(MathematicsError, match=r"step 400: the run diverges: .* 4.1 times its best, 0.4799 of"):
        watch.evaluate([400], [1.5])


def test_a_rise_that_may_end_is_said_once(watch, capsys):
    watch.evaluate([100, 200, 300, 400, 500], [0.0, 0.1, 0.2, 0.3, 0.4])
    assert "".join(capsys.readouterr()).count("the run may diverge") == 1


@pytest.mark.parametrize(
    ("steps", "heights"),
    [
        ([100, 200, 300, 400], [0.0, 0.1, 0.05, 9.0]),  # it fell in between
        ([10, 20, 50, 100], [0.0, 0.1, 0.2, 9.0]),  # before it learned anything
        ([100, 200, 300, 400], [0.0, 0.01, 0.02, 0.03]),  # by 6%
    ],
)
def test_other_rises_are_no_divergence(watch, capsys, steps, heights):
    watch.evaluate(steps, heights)
    assert "warning" not in "".join(capsys.readouterr())


def test_overfitting_is_no_divergence(watch):
    watch.evaluate([100, 200, 300, 400], [0.0, 1.0, 2.0, 3.0], training_ema=[0.4, 0.3, 0.2, 0.1])


def test_an_evaluation_that_is_not_finite_stops_the_run(watch):
    with pytest.raises(MathematicsError, match=r"step 100: the evaluation loss is not finite; there is no checkpoint"):
        watch.evaluate([100], [math.inf])


def test_rises_are_told_from_chance():
    torch.manual_seed(0)
    base = torch.rand(512)
    noise = [0.1 * torch.randn(512) for _ in range(4)]
    noise = [each - each.mean() for each in noise]
    # The standard error of a difference is 0.1 * sqrt(2 / 512) = 0.006.
    assert rises([base + each + 0.02 * i for i, each in enumerate(noise)])
    assert not rises([base + each + 0.005 * i for i, each in enumerate(noise)])
    assert not rises([base, base + 1, base + 0.9, base + 2])
    assert times_the_best([3 * base[:128], base, 2 * base]) == pytest.approx(2)


def test_gradients_that_explode_are_said_once(tmp_path, capsys):
    running = run(tmp_path)
    before_step(running, 14, lambda: running.trainer.step == 14 and plant_in_a_gradient(running, 1e7))
    running.train()
    said = "".join(capsys.readouterr())
    assert said.count("gradients explode") == 1
    assert "warning: step 17: the gradient's norm is " in said


def test_one_steep_gradient_is_none_that_explodes(watch, capsys):
    watch.log([0.5] * 24, [1.0] * 20 + [1e5, 1e5, 1.0, 1e5])
    assert "warning" not in "".join(capsys.readouterr())


def test_outputs_that_explode_are_said_once(watch, capsys):
    watch.evaluate([100], [0.5])
    assert "warning" not in "".join(capsys.readouterr())
    with torch.no_grad():
        watch.running.trainer.parameters["time_embedding.linear_1.weight"].mul_(1e6)
    watch.evaluate([200, 300], [0.4, 0.3])
    said = "".join(capsys.readouterr())
    assert said.count("outputs explode") == 1
    assert "step 200: the output of time_embedding.linear" in said


def test_a_loss_that_does_not_fall_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guards, "SLOW_START_STEPS", 4)
    run(tmp_path, learning_rate=1e-12, log_every=2, steps=6).train()
    assert "".join(capsys.readouterr()).count("still that of predicting nothing (1.000)") == 1


def test_a_loss_that_rises_above_predicting_nothing_again_is_said_once(watch, capsys):
    watch.log([0.9, 0.3, 1.2, 1.2, 0.9, 1.2, 1.2])
    assert "warning" not in "".join(capsys.readouterr())
    watch.log([1.2, 1.2, 1.2])
    assert "".join(capsys.readouterr()).count("again above that of predicting nothing (1.000)") == 1


def test_a_healthy_run_hears_nothing(tmp_path, capsys):
    run(tmp_path, steps=30, batch_size=16).train()
    assert "warning" not in "".join(capsys.readouterr())
