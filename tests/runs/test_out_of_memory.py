"""A run whose memory does not suffice goes on in smaller parts, says so once, and keeps that for --resume."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.errors import NotEnoughMemoryError
from ddpm_fast.runs import checkpoint, decisions
from ddpm_fast.runs.directory import find_start
from ddpm_fast.runs.evaluation import EvaluationSet
from ddpm_fast.runs.run import Run

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(data="digits"),
    training=TrainingConfig(
        steps=6, batch_size=8, warmup_steps=3, log_every=2, save_every=3, sample_every=0, device="cpu"
    ),
)
DATA = open_dataset(TINY.data, TINY.unet)
SPLIT = replace(decisions.decide(TINY.training), accumulate=4)


def run(directory: Path, config: Config = TINY, decided: decisions.Decisions | None = None) -> Run:
    found = find_start(directory, config, DATA.fingerprint, (directory / "config.json").exists())
    return Run(directory, config, DATA, found, progress=False, decided=decided)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have a network's passes fail for more than two images at once in training; note what was tried."""
    losses, tried = Trainer._losses_of_batch, list[int]()

    def fail(self: Trainer, images: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
        tried.append(len(images))
        if len(images) > 2:
            raise MemoryError
        return losses(self, images, sample_index)

    monkeypatch.setattr(Trainer, "_losses_of_batch", fail)
    monkeypatch.setattr("ddpm_fast.runs.guards.LOOKED_AT", 1)
    return tried


def test_a_run_goes_on_in_smaller_parts_says_so_once_and_keeps_it(tmp_path, little_memory, capsys):
    run(tmp_path / "healed").train()
    said = [line for line in capsys.readouterr().out.splitlines() if "memory" in line]
    assert said == [
        "memory did not suffice for 8 images at once: each batch of 8 is now taken in 4 parts, as by --accumulate 4, "
        "which changes nothing else; kept for --resume"
    ]
    assert json.loads((tmp_path / "healed/config.json").read_text())["config"]["training"]["accumulate"] == 1
    decided = decisions.read(tmp_path / "healed")
    assert decided == SPLIT

    run(tmp_path / "split", decided=SPLIT).train()  # from the first step on
    for name in ("model", "ema", "optimizer"):
        files = (tmp_path / way / f"checkpoints/step-0000006/{name}.safetensors" for way in ("healed", "split"))
        assert next(files).read_bytes() == next(files).read_bytes(), name

    little_memory.clear()
    run(tmp_path / "healed", with_training(TINY, steps=8), decisions.settle(TINY.training, decided)[0]).train()
    assert max(little_memory) == 2
    assert decisions.read(tmp_path / "healed") == decided


def test_parts_that_were_enough_are_kept_where_they_divide_the_batch():
    for size, parts in ((8, 4), (6, 1)):
        found, _ = decisions.settle(replace(TINY.training, batch_size=size), SPLIT)
        assert found.accumulate == parts
    found, _ = decisions.settle(replace(TINY.training, accumulate=8), SPLIT)
    assert found.accumulate == 8


def test_one_image_that_does_not_fit_ends_the_run_by_one_line(tmp_path, monkeypatch):
    running = run(tmp_path)

    def fail(*arguments: object) -> torch.Tensor:
        raise MemoryError

    take_step = running.trainer.train_step_no_sync

    def step() -> None:
        if running.trainer.step == 4:
            monkeypatch.setattr(Trainer, "_losses_of_batch", fail)
        take_step()

    running.trainer.train_step_no_sync = step
    with pytest.raises(NotEnoughMemoryError, match="even for one image at a time"):
        running.train()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 3


def test_an_evaluation_that_does_not_fit_is_made_in_smaller_batches(tmp_path, monkeypatch):
    truth, errors = run(tmp_path / "a").evaluation_set, EvaluationSet._errors
    small = run(tmp_path / "b")

    def fail(self: EvaluationSet, *arguments: object) -> torch.Tensor:
        if self._batch > 5:
            raise MemoryError
        return errors(self, *arguments)  # pyright: ignore[reportArgumentType]

    expected = truth.evaluate(small.trainer).errors
    monkeypatch.setattr(EvaluationSet, "_errors", fail)
    for name, values in small._evaluate().errors.items():
        torch.testing.assert_close(values, expected[name])


LIMITED = """
import resource, sys
import torch
import ddpm_fast.api, ddpm_fast.cli.main, torch.utils.tensorboard
megabytes = int(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
ddpm_fast.cli.main.main(sys.argv[2:])
"""
FLAGS = (
    "--preset digits --data images.npy --height 64 --width 64 --image-channels 1 --channels 32 --groups 8 "
    "--res-blocks 1 --channel-multipliers 1 1 --attention-resolutions --device cpu --steps 2 "
    "--sample-every 0 --log-every 1"
)


def with_memory(megabytes: int, directory: Path, command: str) -> tuple[int, str]:
    """Run a command that may take so much more memory than Python and PyTorch do; return its status and words."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [sys.executable, "-c", LIMITED, str(megabytes), *command.split()]
    done = subprocess.run(arguments, cwd=directory, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_on_a_cpu_under_a_real_limit_a_run_and_its_sampling_heal(tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (64, 64, 64), dtype=np.uint8))
    status, said = with_memory(2500, tmp_path, f"train {FLAGS} --batch-size 128 --out run")
    assert (status, said.count("memory did not suffice for")) == (0, 1), said
    assert "step 2 of 2" in said
    decided = decisions.read(tmp_path / "run")
    assert decided is not None
    assert decided.accumulate > 1
    status, said = with_memory(500, tmp_path, "sample run -n 256 --batch-size 256 --sampler ddim --steps 1")
    assert (status, "images are made" in said) == (0, True), said
    status, said = with_memory(20, tmp_path, f"train {FLAGS} --batch-size 64 --out none")
    assert (status, said.splitlines()[-1][:10], "Traceback" in said) == (2, "ddpm-fast:", False), said
