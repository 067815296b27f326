"""How good samples are beside the real images, by measures of which none says it alone.

| measure | says | best |
|---|---|---|
| frechet_pixels | how far the samples' first two moments are from the real images', see `frechet` | near the real |
| frechet_features | the same of the features that a classifier tells the classes by | near the real |
| precision, recall | the share of samples among the real images, and of those among the samples, see `manifold` | 1 |
| frechet_by_class | frechet_features of each class's samples from its own real images, averaged over classes | 0 |
| label_agreement | the share of samples that the classifier takes for what was asked for | the classifier's accuracy |
| confident | the share of samples that the classifier is at least 90% sure of | the real images' |
| class_balance | total variation distance of the samples' classes from the labels' | 0 |
| nearest_training | the median distance to the nearest training image, see `neighbours` | not under the real |

Frechet distances, precision and recall depend on how many samples there are, and no two counts are to be compared: the
count is part of each name. Shapes: N samples, M images, H x W pixels, C channels.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ddpm_fast.errors import require
from ddpm_fast.quality.classifier import Classifier, trained_classifier
from ddpm_fast.quality.distances import Points
from ddpm_fast.quality.frechet import Gaussian, PixelSpace, frechet_distance, gaussian
from ddpm_fast.quality.manifold import precision_and_recall, squared_radii
from ddpm_fast.quality.neighbours import nearest_distances

MEASURES = ("frechet_pixels", "frechet_features", "frechet_by_class", "label_agreement", "precision", "recall")
MEASURES += ("confident", "class_balance")
MEASURES += ("nearest_training",)
CONFIDENT = 0.9
"""Least probability of the likeliest class."""
REAL_ASKED = 1000
"""Real images at most, evenly chosen, whose own distance to the nearest training image is measured."""
LEAST_BY_CLASS = 64
"""Samples and real images of each class that its distance is not measured of: as many as there are features."""
SEED = 0x68616C66
"""Of the halves that real images are split into."""

Images = NDArray[np.uint8]


class Evaluator:
    """Scores samples against real images. What is needed of those is found out once, when it is first asked for."""

    def __init__(
        self,
        images: Images,
        labels: NDArray[np.int64] | None,
        held_out: Images | None = None,
        fingerprint: str = "",
        progress: bool | None = None,
    ) -> None:
        """Take the real images.

        Args:
            images: that were trained on, [M, H, W, C].
            labels: their classes, [M], any integers; None where they have none.
            held_out: of the same kind, that nobody trained on, [M', H, W, C]; None or empty where there are none.
            fingerprint: of the data set that the images are of, by which the classifier is kept.
            progress: show bars for what takes long, or say lines; None for neither.

        Raises:
            InputError: there are fewer than 4 images.
        """
        require(len(images) >= 4, f"{len(images)} images are too few to judge samples by: there must be at least 4")
        self.images, self.progress, self._fingerprint = images, progress, fingerprint
        self.held_out = held_out if held_out is not None and len(held_out) >= 2 else None
        names, classes = np.unique(labels, return_inverse=True) if labels is not None else (np.empty(0), None)
        self._classes, self._names = classes if len(names) > 1 else None, names
        kinds = "have no labels" if labels is None else "are all of one class"
        self.missing = "" if self._classes is not None else f"the images {kinds}: no classifier can judge the samples"
        """Why the measures that need a classifier are left out, or ""."""

    def score(self, samples: Images, asked: NDArray[np.int64] | None = None) -> dict[str, float]:
        """Return each measure of samples [N, H, W, C], and what it is of real images.

        Args:
            samples: to judge.
            asked: the labels that they were made for, [N]; None where they were made for none.

        The names are MEASURE_N; of real images MEASURE_real_COUNT: held-out ones where there are some, else one half
        against the other (the classifier's of those that it was not trained on); nearest_training_held_out, or
        nearest_training_leave_one_out, a training image's distance to the nearest other; and classifier_accuracy.

        Raises:
            InputError: there are fewer than 2 samples, or they are of another shape.
        """
        count = len(samples)
        require(count >= 2, f"--count is {count}: quality is measured over at least 2 samples")
        shapes = "x".join(map(str, samples.shape[1:])), "x".join(map(str, self.images.shape[1:]))
        require(shapes[0] == shapes[1], f"samples are of {shapes[0]} values, and real images of {shapes[1]}")
        scores = {f"frechet_pixels_{count}": frechet_distance(gaussian(self._space(samples)), self._pixels)}
        if self._classifier is not None:
            features = self._classifier.features(samples)
            among = precision_and_recall(features, self._features, self._radii)
            scores[f"frechet_features_{count}"] = frechet_distance(gaussian(features), gaussian(self._features))
            scores |= dict(zip((f"precision_{count}", f"recall_{count}"), among, strict=True))
            if asked is not None:
                scores |= self._by_label(samples, features, asked, str(count))
            scores |= self._judged(samples, str(count))
        near = nearest_distances(samples, self.images, progress=self.progress)
        return scores | {f"nearest_training_{count}": float(np.median(near))} | self.real

    @cached_property
    def real(self) -> dict[str, float]:
        """What the measures are of real images: what they would be of the best samples."""
        a, b = self._parts
        scores = {f"frechet_pixels_real_{len(a)}": _apart(self._space(a), self._space(b))}
        if self._classifier is not None:
            features_a, features_b = self._classifier.features(a), self._classifier.features(b)
            scores[f"frechet_features_real_{len(a)}"] = _apart(features_a, features_b)
            among = precision_and_recall(features_a, features_b, squared_radii(features_b))
            names = (f"precision_real_{len(a)}", f"recall_real_{len(a)}")
            scores |= dict(zip(names, among, strict=True))
            unseen = self.images[self._classifier.unseen] if self.held_out is None else self.held_out
            scores |= self._judged(unseen, f"real_{len(unseen)}")
            scores["classifier_accuracy"] = self._classifier.accuracy
        of, itself = ("held_out", None) if self.held_out is not None else ("leave_one_out", self._chosen(self.images))
        asked = self.images[itself] if self.held_out is None else self.held_out[self._chosen(self.held_out)]
        near = nearest_distances(asked, self.images, itself, self.progress)
        return scores | {f"nearest_training_{of}": float(np.median(near))}

    def _judged(self, images: Images, suffix: str) -> dict[str, float]:
        """Return how sure the classifier is of images, and how far their classes' shares are from the labels'."""
        assert self._classifier is not None
        assert self._classes is not None
        return judged(self._classifier.probabilities(images), self._classes, suffix)

    def _by_label(self, samples: Images, features: Points, asked: NDArray[np.int64], suffix: str) -> dict[str, float]:
        """Return how many samples are what was asked for, and how far each class's are from its real images."""
        assert self._classifier is not None
        known = np.isin(asked, self._names)
        if not known.any():
            return {}
        taken_for = self._names[self._classifier.probabilities(samples).argmax(axis=1)]
        scores = {f"label_agreement_{suffix}": float((taken_for == asked)[known].mean())}
        pairs = [(features[asked == name], self._features[self._classes == i]) for i, name in enumerate(self._names)]
        if min(len(points) for pair in pairs for points in pair) > LEAST_BY_CLASS:
            scores[f"frechet_by_class_{suffix}"] = float(np.mean([_apart(made, real) for made, real in pairs]))
        return scores

    @staticmethod
    def _chosen(images: Images) -> NDArray[np.int64]:
        return np.unique(np.linspace(0, len(images) - 1, min(len(images), REAL_ASKED)).astype(np.int64))

    @cached_property
    def _parts(self) -> tuple[Images, Images]:
        """Two sets of real images that share none: the held-out ones and the others, or two halves."""
        if self.held_out is not None:
            return self.held_out, self.images
        order, half = np.random.default_rng(SEED).permutation(len(self.images)), len(self.images) // 2
        return self.images[np.sort(order[:half])], self.images[np.sort(order[half : 2 * half])]

    @cached_property
    def _space(self) -> PixelSpace:
        return PixelSpace(self.images)

    @cached_property
    def _pixels(self) -> Gaussian:
        return gaussian(self._space(self.images))

    @cached_property
    def _classifier(self) -> Classifier | None:
        if self._classes is None:
            return None
        return trained_classifier(self.images, self._classes, self._fingerprint, self.progress)

    @cached_property
    def _features(self) -> Points:
        assert self._classifier is not None
        return self._classifier.features(self.images)

    @cached_property
    def _radii(self) -> NDArray[np.float64]:
        return squared_radii(self._features)


def _apart(a: Points, b: Points) -> float:
    return frechet_distance(gaussian(a), gaussian(b))


def judged(probabilities: NDArray[np.float64], classes: NDArray[np.int64], suffix: str) -> dict[str, float]:
    """Return the share of confident images, and their classes' total variation distance from the real ones'.

    Args:
        probabilities: of the images' classes, [N, K].
        classes: of the real images, [M], each in 0..K-1.
        suffix: of the names.
    """
    kinds = probabilities.shape[1]
    shares = np.bincount(probabilities.argmax(axis=1), minlength=kinds) / len(probabilities)
    apart = np.abs(shares - np.bincount(classes, minlength=kinds) / len(classes)).sum() / 2
    confident = float((probabilities.max(axis=1) >= CONFIDENT).mean())
    return {f"confident_{suffix}": confident, f"class_balance_{suffix}": float(apart)}


def table(scores: Mapping[str, float], count: int) -> list[str]:
    """Return scores of so many samples as lines: each measure, its value, and the real images' own."""
    rows = []
    for measure in MEASURES:
        name = f"{measure}_{count}"
        if name in scores:
            real = [(other, value) for other, value in scores.items() if other != name and other.startswith(measure)]
            rows.append((name, scores[name], *(real[0] if real else ("", None))))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'':<{width}}    samples       real"]
    for name, value, of, own in rows:
        lines.append(f"{name:<{width}}{value:11.4f}" + ("" if own is None else f"{own:11.4f}  {of}"))
    if "classifier_accuracy" in scores:
        right = scores["classifier_accuracy"]
        lines.append(f"features and classes are those of a classifier that gets {right:.1%} of unseen images right")
    return lines
