"""Sample quality while a run trains: when it is measured, where it is kept, and that it changes no other number."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.batches import split
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.data.digits import read_digits
from ddpm_fast.quality import classifier
from ddpm_fast.runs.compare import open_run
from ddpm_fast.runs.directory import find_start, read_metrics
from ddpm_fast.runs.run import Run
from ddpm_fast.runs.scores import evaluator_of, side_by_side
from ddpm_fast.runs.signals import InterruptedRunError
from tests.runs.test_run import signal_when_called

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(data="digits"),
    training=TrainingConfig(
        steps=5,
        batch_size=4,
        warmup_steps=3,
        log_every=3,
        sample_every=0,
        evaluate_every=2,
        evaluate_count=5,
        device="cpu",
    ),
)
DATA = open_dataset(TINY.data, TINY.unet)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(classifier, "EXAMPLES", 200)


def train(directory: Path, config: Config = TINY, resume: bool = False) -> None:
    found = find_start(directory, config, DATA.fingerprint, resume)
    Run(directory, config, DATA, found, progress=False).train()


def scored(run: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line["quality"] for line in read_metrics(run) if "quality" in line}


def weights(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((run / "checkpoints/step-0000005").glob("*.safetensors"))]


def test_a_run_is_scored_at_the_steps_asked_for_and_at_its_end_and_trains_the_same(tmp_path, capsys):
    train(tmp_path / "scored")
    scores = scored(tmp_path / "scored")
    assert list(scores) == [2, 4, 5]
    assert {"frechet_pixels_5", "precision_5", "frechet_pixels_real_898"} <= scores[5].keys()
    out = capsys.readouterr().out
    assert "step 5: frechet_pixels_5 " in out
    assert "real" not in out
    train(tmp_path / "blind", with_training(TINY, evaluate_every=0))
    assert scored(tmp_path / "blind") == {}
    assert weights(tmp_path / "scored") == weights(tmp_path / "blind")
    assert side_by_side(open_run(tmp_path / "scored"), open_run(tmp_path / "blind")) == []
    first, *lines = side_by_side(open_run(tmp_path / "scored"), open_run(tmp_path / "scored"))
    assert first.startswith("sample quality at step 5")
    assert lines[0].split() == ["frechet_pixels_5", *2 * [f"{scores[5]['frechet_pixels_5']:.4f}"]]


def test_scores_that_were_interrupted_are_made_when_the_run_goes_on(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    with monkeypatch.context() as patches:
        signal_when_called(patches, "ddpm_fast.runs.scores.to_uint8", 3)  # after the last step
        with pytest.raises(InterruptedRunError, match="saved step 5; continue by"):
            train(tmp_path / "stopped")
    assert list(scored(tmp_path / "stopped")) == [2, 4]
    train(tmp_path / "stopped", resume=True)
    assert json.dumps(scored(tmp_path / "stopped")) == json.dumps(scored(tmp_path / "whole"))


def test_what_is_held_out_is_not_among_the_images_that_samples_are_judged_by():
    config = replace(TINY, data=replace(TINY.data, holdout=0.1))
    evaluator = evaluator_of(config, DATA)
    trained, held_out = split(len(DATA), 0.1)
    assert evaluator.held_out is not None
    np.testing.assert_array_equal(evaluator.images, DATA.images[trained.numpy()])
    np.testing.assert_array_equal(evaluator.held_out, DATA.images[held_out.numpy()])
    np.testing.assert_array_equal(evaluator._classes, read_digits()[1][trained.numpy()])
