"""evaluate from the command line, from one end to the other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro")
from ddpm_fast.cli import main as cli
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.data.digits import read_digits
from ddpm_fast.quality import classifier
from ddpm_fast.runs.run import Run

IMAGES, LABELS = read_digits()
FLAGS = ["--count", "6", "--sampler", "ddim", "--steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of a few steps, beside its images."""
    directory = tmp_path_factory.mktemp("runs")
    np.savez(directory / "images.npz", images=IMAGES[:100], labels=LABELS[:100])
    config = Config(
        unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), attention_resolutions=(), groups=4),
        diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
        data=DataConfig(data=str(directory / "images.npz")),
        training=TrainingConfig(steps=2, batch_size=4, sample_every=0, device="cpu"),
    )
    Run(directory / "run", config, open_dataset(config.data, config.unet), None, progress=False).train()
    return directory / "run"


def test_scores_are_a_table_and_a_file(run, capsys, monkeypatch):
    monkeypatch.setattr(classifier, "EXAMPLES", 200)
    assert cli.run(["evaluate", str(run), *FLAGS]) == 0
    out = capsys.readouterr().out
    facts = json.loads((run / "quality/step-0000002-ddim-3-seed0-6-images.json").read_text())
    assert facts["scores"].keys() >= {"frechet_pixels_6", "recall_6", "confident_real_10", "classifier_accuracy"}
    expected = {"step": 2, "sampler": "ddim", "steps": 3, "count": 6, "seed": 0, "weights": "ema"}
    assert facts | expected == facts
    assert f"{facts['scores']['frechet_pixels_6']:.4f}" in out
    before = (run / "quality/step-0000002-ddim-3-seed0-6-images.json").read_bytes()
    assert cli.run(["evaluate", str(run / "checkpoints/step-0000002"), *FLAGS, "--batch-size", "64"]) == 0
    assert (run / "quality/step-0000002-ddim-3-seed0-6-images.json").read_bytes() == before
    assert cli.run(["evaluate", str(run), "--count", "6", "--device", "cpu"]) == 0  # by the run's own sampler
    assert cli.run(["evaluate", str(run), *FLAGS, "--weights", "raw", "--seed", "3"]) == 0
    assert (run / "quality/step-0000002-ddim-3-seed0-6-images.json").read_bytes() == before
    assert (run / "quality/step-0000002-ddim-3-raw-seed3-6-images.json").exists()
    facts = json.loads((run / "quality/step-0000002-ddpm-20-seed0-6-images.json").read_text())
    assert (facts["sampler"], facts["steps"]) == ("ddpm", 20)


def test_images_that_moved_are_named_by_data(run, tmp_path, capsys):
    copied = tmp_path / "model"
    shutil.copytree(run / "checkpoints/step-0000002", copied)
    images = run.parent / "images.npz"
    moved = images.rename(tmp_path / "moved.npz")
    try:
        assert cli.run(["evaluate", str(copied), *FLAGS]) == 2
        assert f"{copied} was trained on it: where it was moved, name it by --data" in capsys.readouterr().err
        np.savez(tmp_path / "plain.npz", IMAGES[:100])  # the same images, without their labels
        assert cli.run(["evaluate", str(copied), *FLAGS, "--data", str(tmp_path / "plain.npz")]) == 0
        assert "the images have no labels: no classifier can judge the samples" in capsys.readouterr().out
        assert (copied / "quality/step-0000002-ddim-3-seed0-6-images.json").exists()
    finally:
        moved.rename(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        ([], "there is no run with a checkpoint in runs/"),
        (["RUN", "--count", "1"], "--count is 1: quality is measured over at least 2 samples"),
        (["RUN", "--steps", "21"], "--steps is 21: it must lie in 1..20"),
        (["RUN", "--data", "digits"], "holds other images now than"),
        (["RUN", "--cuont", "3"], "Did you mean '--count'?"),
    ],
)
def test_what_cannot_be_scored_is_one_line(run, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(run.rglob("*"))
    assert cli.run(["evaluate", *(str(run) if each == "RUN" else each for each in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert sorted(run.rglob("*")) == before
