"""Is each image shown with its own label, or none where that is withheld, and does the network listen to it?

Shapes: N examples, M images of the data set.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.checks.chance import most_by_chance
from ddpm_fast.checks.draws import LabelProbe
from ddpm_fast.checks.recording import TrainingStep
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.config import Config
from ddpm_fast.constants import Stream
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import NoiseAddress, example_word, key_from_seed
from ddpm_fast.engine.sampling import ImageRange
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.model.unet import UNet

MOST_IMAGES, EXAMPLES = 2**16, 2**13
GUIDANCE = 1.75
"""Of the loops that are guided."""
LEAST_EFFECT = 1e-4
"""Relative: by how much another label changes what a perturbed network predicts, at least (measured: 0.02 and more)."""
DATA, TRAINER, NOISE = (f"ddpm_fast/{path}.py" for path in ("data/batches", "engine/trainer", "diffusion/noise"))
MODEL = "ddpm_fast/model/unet.py"


def check_labels(config: Config, dataset: Dataset, device: torch.device) -> Iterator[CheckResult]:
    """Check which labels a conditional U-Net's images come with, and which of them are withheld.

    Args:
        config: the run's.
        dataset: the run's.
        device: where it computes.
    """
    if config.unet.classes:
        yield _check_source(config, len(dataset), device)
        yield check_withheld(config, device)


def _check_source(config: Config, count: int, device: torch.device) -> CheckResult:
    """Check that labels come with their images, which here hold their own number as pixels."""
    count, classes = min(count, MOST_IMAGES), config.unet.classes
    generator = np.random.default_rng(0)
    labels, numbers = generator.integers(classes, size=count), np.arange(count, dtype="<u4")
    images = numbers.view(np.uint8).reshape(count, 1, 4, 1)
    holdout = max(config.data.holdout, 1 / count) if config.data.holdout else 0
    source = BatchSource(Dataset(images, "", ""), key_from_seed(config.training.seed), device, holdout, labels)
    n, wrong = max(1, count * 2 // 3), 0
    for first in (0, n, 2 * n):  # each, and over the end of an epoch
        pixels, _, *told = source.batch(first, n)
        number = (pixels[:, 0, 0].long().cpu() << torch.tensor([0, 8, 16, 24])).sum(1)
        wrong += int((told[0].cpu() != torch.from_numpy(labels)[number]).sum()) if told else n
    name, expected = "images come with their own labels", f"{3 * n} labels"
    found = f"{wrong} of {3 * n} otherwise" if wrong else expected
    return CheckResult("labels", name, judged(not wrong), expected, found, DATA)


def _withheld(config: Config, key: Tensor, sample_index: Tensor) -> Tensor:
    """Return which examples' labels are withheld: [N] bool."""
    uniform = example_word(NoiseAddress(key, sample_index), Stream.LABEL).double() / 2**32
    return uniform < config.training.label_dropout


def check_withheld(config: Config, device: torch.device) -> CheckResult:
    """Check that labels are withheld as often as configured, by the example's address, and else told as they are."""
    probe, p = LabelProbe(config, device), config.training.label_dropout
    labels = torch.arange(EXAMPLES, device=device) % config.unet.classes
    told = probe.draw(labels)
    none, withheld = told == config.unet.classes, _withheld(config, probe.key, torch.arange(EXAMPLES, device=device))
    name, expected = "labels are withheld from their share of examples", f"{p:.1%}, by seed and example"
    share, found = float(none.double().mean()), expected
    if not torch.equal(told[~none], labels[~none]):
        found = "other labels instead"
    elif abs(share - p) * EXAMPLES > most_by_chance(EXAMPLES * p * (1 - p), max(p, 1 - p)):
        found = f"{share:.1%}"
    elif not torch.equal(none, withheld):
        found = f"{share:.1%}, but from others than of these addresses"
    return CheckResult("labels", name, judged(found == expected), expected, found, f"{TRAINER} or {NOISE}")


def check_told(trainer: Trainer, steps: list[TrainingStep]) -> Iterator[CheckResult]:
    """Check that recorded steps told a conditional U-Net their batch's labels, and that it makes a difference.

    Args:
        trainer: whose steps they are, with weights that hide nothing (see `stand_in.perturb`).
        steps: recorded ones.
    """
    if not trainer.config.unet.classes:
        return
    found = next((words for step in steps if (words := _told_otherwise(trainer, step))), "so")
    name, expected = "the network is told its examples' labels", "the batch's, or none where withheld"
    yield CheckResult("labels", name, judged(found == "so"), expected, found, TRAINER)
    yield _check_effect(trainer, steps[1])


def _told_otherwise(trainer: Trainer, step: TrainingStep) -> str:
    """Say which other labels the network was told in a step than it should, or nothing."""
    _, _, _, numbers, labels = step.batches[0]
    used = step.joined("q_sample", "sample_index")
    own = labels[(used[:, None] == numbers).int().argmax(1)]
    key = key_from_seed(trainer.config.training.seed, trainer.device)
    expected = own.masked_fill(_withheld(trainer.config, key, used), trainer.config.unet.classes)
    told = [call.given.get("labels") for call in step.modules[""]]
    if not all(isinstance(each, Tensor) for each in told):
        return f"none in step {step.number}"
    joined = torch.cat([each for each in told if each is not None])
    same = torch.equal(joined, expected)
    return "" if same else f"{joined.tolist()}, not {expected.tolist()}, in step {step.number}"


@torch.no_grad()
def _check_effect(trainer: Trainer, step: TrainingStep) -> CheckResult:
    """Check that every label makes a prediction of its own: an embedding that is not added would make none."""
    classes, x, t = trainer.config.unet.classes, step.returned("q_sample")[:1], step.told(1, "t")[:1]
    some = sorted({0, 1, classes - 1, classes} & set(range(classes + 1)))
    predictions = [trainer.unet(x, t, labels=torch.full_like(t, label)) for label in some]
    apart = [float((a - b).norm() / a.norm()) for i, a in enumerate(predictions) for b in predictions[i + 1 :]]
    name, expected = "another label makes another prediction", f"{LEAST_EFFECT:.0e} of its size or more"
    right, found = min(apart) > LEAST_EFFECT, f"{min(apart):.0e}"
    return CheckResult("labels", name, judged(right), expected, found, MODEL)


def asked_of(unet: UNet, images: ImageRange, guided: bool) -> ImageRange:
    """Return the images with labels that a conditional U-Net knows, and guided if that is wanted."""
    classes = unet.config.classes
    labels, guidance = (classes - 1, 0, classes // 2), GUIDANCE if guided else 1.0
    return replace(images, labels=labels, guidance=guidance) if classes else images


def predicted(training: UNet, x: Tensor, t: Tensor, numbers: Tensor, images: ImageRange) -> Tensor:
    """Return what training's network predicts for x [N, C, H, W] at t [N] of images by numbers [N], guided as asked."""
    if not images.labels:
        return training(x, t)
    labels = torch.tensor(images.labels, device=x.device)[numbers % len(images.labels)]
    own = training(x, t, labels=labels)
    without = training(x, t, labels=torch.full_like(labels, training.config.classes))
    return own if images.guidance == 1 else without + images.guidance * (own - without)
