"""What samples are said to be: copies, noise, one class alone; and the classifier that says so."""

import numpy as np
import pytest
import torch

from ddpm_fast.data.digits import read_digits
from ddpm_fast.errors import InputError
from ddpm_fast.quality import classifier
from ddpm_fast.quality.classifier import trained_classifier
from ddpm_fast.quality.evaluator import Evaluator, judged, table

IMAGES, LABELS = read_digits()
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (200, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def digits() -> Evaluator:
    return Evaluator(IMAGES, LABELS, fingerprint="digits")


@pytest.fixture
def _quick(monkeypatch):
    """A classifier that is trained for an instant."""
    monkeypatch.setattr(classifier, "EXAMPLES", 1000)


def test_the_classifier_of_digits_is_nearly_always_right(digits):
    assert digits.real["classifier_accuracy"] >= 0.97
    assert digits.real["confident_real_180"] >= 0.9


def test_copies_are_seen_as_copies(digits):
    scores = digits.score(IMAGES[:1000])
    assert scores["nearest_training_1000"] == 0
    assert scores["nearest_training_leave_one_out"] == pytest.approx(2.03, abs=0.1)
    assert scores["precision_1000"] == 1
    assert scores["frechet_pixels_1000"] < scores["frechet_pixels_real_898"]


def test_noise_is_far_worse_than_real_images(digits):
    noise = digits.score(NOISE)
    real = digits.score(IMAGES[RANDOM.permutation(len(IMAGES))[:200]])
    for name in ("frechet_pixels_200", "frechet_features_200"):
        assert noise[name] > 10 * real[name]
    assert noise["precision_200"] < 0.3 < 0.9 < real["precision_200"]
    assert noise["nearest_training_200"] > 3 * noise["nearest_training_leave_one_out"]
    assert noise["class_balance_200"] > 0.5 > 5 * real["class_balance_200"]


def test_one_class_alone_is_neither_balanced_nor_complete(digits):
    scores = digits.score(IMAGES[LABELS == 3])
    assert scores["class_balance_183"] == pytest.approx(1 - 183 / 1797, abs=0.02)
    assert scores["confident_183"] > 0.9
    assert scores["recall_183"] < 0.3


def test_confidence_and_balance_of_a_planted_classifier():
    probabilities = np.array([[0.95, 0.05, 0], [0.9, 0.1, 0], [0.5, 0.4, 0.1], [0.2, 0.8, 0]])
    classes = np.array([0, 0, 1, 2])  # half, a quarter, a quarter; predicted: three quarters, a quarter, none
    assert judged(probabilities, classes, "4") == {"confident_4": 0.5, "class_balance_4": 0.25}


def test_the_classifier_is_kept_and_touches_no_other_randomness(monkeypatch):
    monkeypatch.setattr(classifier, "EXAMPLES", 1000)
    before = torch.get_rng_state()
    first = trained_classifier(IMAGES[:300], LABELS[:300], "")
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(classifier, "_train", None)  # would fail
    again = trained_classifier(IMAGES[:300], LABELS[:300], "")
    np.testing.assert_array_equal(again.probabilities(NOISE), first.probabilities(NOISE))
    assert (again.accuracy, again.unseen.tolist()) == (first.accuracy, first.unseen.tolist())
    with pytest.raises(TypeError):
        trained_classifier(IMAGES[1:301], LABELS[:300], "")  # other images


@pytest.mark.usefixtures("_quick")
def test_the_same_images_give_the_same_classifier_and_a_torn_one_is_made_again(tmp_path, monkeypatch):
    found = []
    for name in "ab":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        trained_classifier(IMAGES[:300], LABELS[:300], "x")
        found += (tmp_path / name).rglob("*.safetensors")
    whole = found[0].read_bytes()
    assert found[1].read_bytes() == whole
    found[1].write_bytes(whole[:1000])
    trained_classifier(IMAGES[:300], LABELS[:300], "x")
    assert found[1].read_bytes() == whole


@pytest.mark.usefixtures("_quick")
def test_held_out_images_are_what_samples_are_put_beside():
    scores = Evaluator(IMAGES[100:400], LABELS[100:400], IMAGES[:100]).score(NOISE)
    expected = {"frechet_pixels_real_100", "confident_real_100", "precision_real_100", "nearest_training_held_out"}
    assert expected <= scores.keys()
    assert "nearest_training_leave_one_out" not in scores
    lines = table(scores, 200)
    assert [line.split()[0] for line in lines[1:3]] == ["frechet_pixels_200", "frechet_features_200"]
    assert "nearest_training_held_out" in lines[7]


@pytest.mark.parametrize(
    ("labels", "why"), [(None, "have no labels"), (np.zeros(50, np.int64), "are all of one class")]
)
def test_without_classes_what_needs_none_is_said_and_why_the_rest_is_missing(labels, why):
    evaluator = Evaluator(IMAGES[:50], labels)
    assert why in evaluator.missing
    names = {"frechet_pixels_200", "nearest_training_200", "frechet_pixels_real_25", "nearest_training_leave_one_out"}
    assert evaluator.score(NOISE).keys() == names


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(InputError, match="3 images are too few"):
        Evaluator(IMAGES[:3], None)
    with pytest.raises(InputError, match="--count is 1"):
        Evaluator(IMAGES[:9], None).score(NOISE[:1])
    with pytest.raises(InputError, match="samples are of 8x8x3 values, and real images of 8x8x1"):
        Evaluator(IMAGES[:9], None).score(NOISE.repeat(3, axis=3))


@pytest.mark.usefixtures("_quick")
def test_few_images_of_any_shape_and_labels_are_scored():
    images = RANDOM.integers(0, 256, (6, 70, 40, 3)).astype(np.uint8)
    scores = Evaluator(images, np.array([-7, 900, -7, 900, 900, 3])).score(images[:2])
    assert np.isfinite(list(scores.values())).all()
