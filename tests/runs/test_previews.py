"""When a run draws, and how much: early and ever more rarely, next to nothing of its time, and never unasked for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.errors import MathematicsError
from ddpm_fast.presets import PRESETS
from ddpm_fast.runs.evaluation import is_round
from ddpm_fast.runs.previews import Previews, last_due
from ddpm_fast.runs.run import Run

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(data="digits"),
    training=TrainingConfig(steps=25, batch_size=8, warmup_steps=3, log_every=5, sample_every=12, device="cpu"),
)
DATA = open_dataset(TINY.data, TINY.unet)
DIGITS = with_training(PRESETS["digits"], steps=1200, batch_size=64, sample_every=300)


class Standing:
    """A trainer that stands at a step, of a U-Net with so many FLOPs an image."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, step: int, flop: float = 3e7) -> None:
        self.step, self.flop = step, flop
        self.unet = self

    def estimate_flop(self) -> float:
        return self.flop


def due(tmp_path: Path, step: int, config: Config = DIGITS, flop: float = 3e7) -> int:
    previews = Previews(config, tmp_path, Standing(step, flop), False)  # pyright: ignore[reportArgumentType]
    return previews.images_due(step == config.training.steps)


def test_round_steps():
    assert [step for step in range(3000) if is_round(step)] == [10, 20, 50, 100, 200, 500, 1000, 2000]


@pytest.mark.parametrize(
    ("step", "images"), [(0, 16), (1, 0), (10, 16), (11, 0), (50, 64), (300, 64), (310, 0), (600, 64), (1200, 64)]
)
def test_digits_are_drawn_early_and_as_asked(tmp_path, step, images):
    # A grid of 64 by 20 steps takes 1,280 passes forwards; a step of 64 images as much as 192, of which an early grid
    # may take a quarter. Since the last that was due it is 10 steps (0, 10), 30 (20, 50), 100 (200, 300; 500, 600).
    assert due(tmp_path, step) == images


def test_what_takes_longer_than_its_share_is_smaller_or_left_out(tmp_path):
    config = with_training(PRESETS["cifar10"], batch_size=2, steps=1000, sample_every=400)
    # A step of 2 images takes as long as 6 passes, so 3.3 steps an image of 20 passes; four times that one drawn early.
    # Steps since the last that was due: 10, 10, 30, 50, 100 (since 400); and 200 (since 200), 200 (since 800).
    assert [due(tmp_path, step, config) for step in (10, 20, 50, 100, 500)] == [0, 0, 1, 1, 4]
    assert [due(tmp_path, step, config) for step in (400, 1000)] == [16, 16]
    assert due(tmp_path, 1, with_training(config, steps=1)) == 1  # what is asked for is drawn
    assert due(tmp_path, 0, config, flop=1.2e10) == 0


def test_a_grid_may_be_due_at_round_steps_and_as_asked():
    assert [last_due(step, 300) for step in (1, 10, 11, 50, 51, 300, 301, 600, 1200, 25000)] == [
        *(0, 0, 10, 20, 50, 200, 300, 500, 1000, 24900)
    ]


def test_large_images_are_few(tmp_path):
    config = with_training(PRESETS["church256"], sample_every=7)
    assert due(tmp_path, 7, config) == 16


def pictures(directory: Path) -> list[str]:
    return sorted(path.stem for path in (directory / "samples").glob("*_raw.png"))


def train(directory: Path, **changes: int) -> Run:
    run = Run(directory, with_training(TINY, **changes), DATA, None, progress=False)
    run.train()
    return run


def test_a_run_draws_before_its_first_step_and_changes_no_number(tmp_path):
    train(tmp_path / "drawn", sample_every=12)
    names = ["step-0000000_raw", "step-0000012_raw", "step-0000024_raw", "step-0000025_raw"]
    assert set(names) <= set(pictures(tmp_path / "drawn"))
    train(tmp_path / "blind", sample_every=0)
    assert pictures(tmp_path / "blind") == []
    for part in ("model", "ema", "optimizer"):
        file = f"checkpoints/step-0000025/{part}.safetensors"
        assert (tmp_path / "drawn" / file).read_bytes() == (tmp_path / "blind" / file).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("drawn", "blind")
    ]
    assert losses[0] == losses[1]


def test_grids_begin_from_the_same_noise(tmp_path):
    run = Run(tmp_path, TINY, DATA, None, progress=False)
    few, many = (run.previews.draw(count) for count in (4, 16))
    torch.testing.assert_close(few, many[:4], rtol=0, atol=1e-5)
    with Image.open(tmp_path / "samples/step-0000000_normalized.png") as image:
        assert np.asarray(image).std() > 20


def test_an_early_grid_that_overflows_does_not_end_the_run_but_one_that_was_asked_for_does(tmp_path, capsys):
    run = Run(tmp_path, replace(TINY, diffusion=replace(TINY.diffusion, clip=False)), DATA, None, progress=False)
    run.trainer.ema["conv_out.bias"].fill_(torch.nan)
    with pytest.raises(MathematicsError, match="a sampled value is not finite"):
        run.train()
    assert "step 0: no grid was drawn: a sampled value is not finite" in capsys.readouterr().out
    assert run.trainer.step == 12
