"""Labels and guidance from one end to the other: a conditional run is trained, sampled from and judged."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tyro")
import ddpm_fast
from ddpm_fast.cli import main as cli
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.data.digits import read_digits
from ddpm_fast.presets import PRESETS
from ddpm_fast.quality import classifier
from ddpm_fast.quality.evaluator import Evaluator
from ddpm_fast.runs import evaluation
from ddpm_fast.runs.previews import Previews
from ddpm_fast.runs.run import Run

IMAGES, LABELS = read_digits()
FLAGS = ["--sampler", "ddim", "--steps", "3", "--device", "cpu"]
UNET = UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), attention_resolutions=(), groups=4, num_classes=10)


def trained(directory: Path, unet: UNetConfig, **training: float) -> Path:
    """Return a run of a few steps on 100 digits, whose weights say something else for every label."""
    np.savez(directory / "images.npz", images=IMAGES[:100], labels=LABELS[:100])
    config = Config(
        unet=unet,
        diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
        data=DataConfig(data=str(directory / "images.npz")),
        training=replace(TrainingConfig(steps=2, batch_size=4, sample_every=0, device="cpu"), **training),
    )
    run = Run(directory / "run", config, open_dataset(config.data, config.unet), None, progress=False)
    with torch.no_grad():
        for name, average in run.trainer.ema.items():
            average.normal_(std=1.0 if name == "class_embedding.weight" else 0.2)
    run.train()
    return directory / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("conditional"), UNET)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("unconditional"), replace(UNET, num_classes=0))


def images(run: Path, *flags: str) -> list[bytes]:
    """Return the files that sample writes, in the order of their numbers."""
    assert cli.run(["sample", str(run), "-n", "4", *FLAGS, *flags]) == 0
    newest = max((run / "samples").iterdir(), key=lambda directory: directory.stat().st_mtime_ns)
    return [file.read_bytes() for file in sorted(newest.glob("0*.png"))]


def test_images_are_of_the_labels_that_were_asked_for(run):
    sevens, others = images(run, "--label", "7"), images(run, "--label", "7", "2", "-1")
    assert [a == b for a, b in zip(sevens, others, strict=True)] == [True, False, False, True]
    in_turn, named = images(run), images(run, "--label", "0", "1", "2", "3")
    assert in_turn == named
    model = ddpm_fast.load(run, device="cpu")
    asked = {"sampler": "ddim", "steps": 3, "progress": False, "return_tensor": True}
    x = model.sample(4, label=7, **asked)
    assert torch.equal(x, model.sample(4, label=[7], **asked))
    assert not torch.equal(x, model.sample(4, label=8, **asked))
    assert torch.equal(x, model.sample(4, label=7, **asked))
    kinds = [json.loads(file.read_text()) for file in (run / "samples").glob("*/samples.json")]
    assert sorted(kind["label"] for kind in kinds) == [[0, 1, 2, 3], [*range(10)], [7], [7, 2, 10]]


def test_guidance_changes_images_and_is_kept_apart(run, unconditional):
    plain, guided = images(run, "--label", "7"), images(run, "--label", "7", "--guidance", "2")
    assert guided != plain
    by_another = images(run, "--label", "7", "--guidance", "2", "--guide", str(unconditional))
    assert by_another not in (plain, guided)
    assert images(unconditional, "--guidance", "2", "--guide", str(run)) != images(unconditional)
    model = ddpm_fast.load(run, device="cpu")
    asked = {"sampler": "ddim", "steps": 3, "progress": False, "return_tensor": True, "label": 7}
    x = [model.sample(2, guidance=guidance, **asked) for guidance in (1.0, 2.0, 3.0)]
    middle, wide = model.sample(2, guidance=2.0, guide=unconditional, **asked), model.sample(2, guidance=2.0, **asked)
    assert torch.equal(wide, x[1])
    assert len({tensor.sum().item() for tensor in (*x, middle)}) == 4


REFUSED = {
    "unknown label": (["--label", "12"], "--label 12: .* knows no label 12: it knows 0 to 9, and -1 for none"),
    "one of several": (["--label", "1", "-2"], r"knows no label -2"),
    "no number": (["--label", "seven"], "--label is .*: it must be whole numbers"),
    "negative guidance": (["--guidance", "-1"], "--guidance is -1.0: it must not be negative"),
    "no guidance": (["--guide", "runs/other"], "--guide runs/other has no effect with a --guidance of 1"),
    "no guide": (["--guide", "nowhere", "--guidance", "2"], "nowhere does not exist"),
}


@pytest.mark.parametrize(("flags", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_refused(run, tmp_path, capsys, flags, sentence):
    assert cli.run(["sample", str(run), "--out", str(tmp_path / "out"), *FLAGS, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--label", "7"], "--label 7: .* was trained without labels: leave it out"),
        (["--guidance", "2"], "--guidance 2: .* was trained without labels: .* name another run by --guide"),
    ],
)
def test_an_unconditional_run_has_no_labels(unconditional, tmp_path, capsys, flags, sentence):
    for command in ("sample", "evaluate"):
        assert cli.run([command, str(unconditional), *FLAGS, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(sentence, line)


def test_a_run_that_always_saw_labels_has_nothing_to_guide_it(tmp_path, capsys):
    always = trained(tmp_path, UNET, label_dropout=0.0)
    for flags in (["--guidance", "2"], ["--label", "-1"]):
        assert cli.run(["sample", str(always), *FLAGS, *flags]) == 2
        assert "--label-dropout 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("unet", "sentence"),
    [
        (replace(UNET, height=4), "--guide .* makes images of 1x4x8, not 1x8x8"),
        (replace(UNET, num_classes=11), "--guide .* knows 11 classes, not 10"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(run, tmp_path, capsys, unet, sentence):
    guide = trained(tmp_path, unet)
    assert cli.run(["sample", str(run), *FLAGS, "--guidance", "2", "--guide", str(guide)]) == 2
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("num_classes", "data", "sentence"),
    [
        ("5", "images.npz", "--num-classes 5: labels are 0 to 4, but those of .* are 0 to 9"),
        ("auto", "none.npy", "none.npy has no labels, which --num-classes needs"),
        ("auto", "few.npz", "few.npz.*: it must hold one whole number for each of the 100 images"),
        ("-1", "images.npz", "--num-classes is -1: negative"),
        ("ten", "images.npz", "--num-classes is 'ten': it must be a whole number, or auto"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path, monkeypatch, capsys, num_classes, data, sentence):
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", images=IMAGES[:100], labels=LABELS[:100])
    np.savez("few.npz", images=IMAGES[:100], labels=LABELS[:99])
    np.save("none.npy", IMAGES[:100])
    assert cli.run(["train", "--preset", "digits", "--data", data, "--num-classes", num_classes, "--out", "out"]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert [file for file in Path("out").rglob("*") if file.is_file()] == []


@pytest.mark.slow
def test_auto_is_kept_as_a_number(tmp_path, monkeypatch):
    np.savez(tmp_path / "images.npz", images=IMAGES[:100], labels=LABELS[:100])
    unet = replace(UNET, num_classes=0)
    tiny = Config(unet=unet, training=TrainingConfig(steps=1, batch_size=4, sample_every=0, device="cpu"))
    monkeypatch.setitem(PRESETS, "digits", tiny)
    flags = ["--data", str(tmp_path / "images.npz"), "--num-classes", "auto", "--out", str(tmp_path / "run")]
    assert cli.run(["train", "--preset", "digits", *flags]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["unet"]["num_classes"] == 10
    assert cli.run(["train", "--out", str(tmp_path / "run"), "--resume", "--num-classes", "auto", "--steps", "2"]) == 0


def test_a_conditional_run_becomes_a_folder_of_diffusers_with_the_same_images(run, tmp_path, capsys):
    assert cli.run(["convert", str(run), str(tmp_path / "folder"), "--images", "2"]) == 0
    assert "of labels 0, 1, ... in turn" in (tmp_path / "folder/README.md").read_text()
    assert images(tmp_path / "folder", "--guidance", "2") == images(run, "--guidance", "2")
    assert cli.run(["convert", str(tmp_path / "folder"), str(tmp_path / "ours")]) == 0
    assert "cannot guide itself" not in capsys.readouterr().out
    (tmp_path / "folder/ddpm-fast.json").unlink()
    assert cli.run(["convert", str(tmp_path / "folder"), str(tmp_path / "theirs")]) == 0
    assert "its 11 labels all count as classes, none as no label" in capsys.readouterr().out


def test_evaluation_asks_for_the_real_labels_and_reports_agreement(run, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "EXAMPLES", 200)
    assert cli.run(["evaluate", str(run), "--count", "12", *FLAGS]) == 0
    assert "no distance by class" in capsys.readouterr().out
    (file,) = (run / "quality").glob("*12-images.json")
    assert 0 <= json.loads(file.read_text())["scores"]["label_agreement_12"] <= 1


def test_agreement_and_distances_by_class_are_those_of_real_images(monkeypatch):
    monkeypatch.setattr(classifier, "EXAMPLES", 7000)
    evaluator = Evaluator(IMAGES, LABELS)
    chosen = np.arange(900)
    scores = evaluator.score(IMAGES[chosen], LABELS[chosen])
    assert scores["label_agreement_900"] > 0.9
    exchanged = evaluator.score(IMAGES[chosen], (LABELS[chosen] + 1) % 10)
    assert exchanged["label_agreement_900"] < 0.05
    assert exchanged["frechet_by_class_900"] > 5 * scores["frechet_by_class_900"]
    assert exchanged["frechet_features_900"] == scores["frechet_features_900"]
    none = evaluator.score(IMAGES[:100], np.full(100, 10))
    assert "label_agreement_100" not in none


def test_the_evaluation_loss_and_previews_are_told_labels(run):
    found = ddpm_fast.load(run, device="cpu")
    dataset = open_dataset(found.config.data, found.config.unet)
    trainer = Run(run, found.config, dataset, None, progress=False).trainer
    with torch.no_grad():
        for average in trainer.ema.values():  # not the near-zero start: the network must matter
            average.normal_(std=0.3)
    own = evaluation.EvaluationSet(found.config, dataset, trainer.device).evaluate(trainer).errors["ema"]
    assert dataset.labels is not None
    others = replace(dataset, labels=(dataset.labels + 1) % 10)
    shifted = evaluation.EvaluationSet(found.config, others, trainer.device).evaluate(trainer).errors["ema"]
    assert not torch.allclose(own, shifted)
    previews = Previews(found.config, run, trainer, bar=False)
    assert torch.equal(previews.samples(12), previews.samples(12, tuple(range(10))))
    assert not torch.equal(previews.samples(3), previews.samples(3, (5,)))
