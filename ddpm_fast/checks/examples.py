"""Which image each training example is: does every epoch visit all of them, in an order of its own?

A stand-in for the data set has as many images, each of which holds its own number as pixels: what a batch holds then
says which images it is made of, whatever path they took.
Shapes: M images of the data set, n examples, E epochs.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.checks.chance import RARE, of_sigmas
from ddpm_fast.checks.draws import OTHER_SEEDS, with_least_unet
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.config import Config
from ddpm_fast.data.batches import BatchSource, split
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.engine.trainer import Trainer

QUICK_IMAGES = 2**18
"""Images of the stand-in at most, unless in full."""
MOST_KEPT = 14
"""Images that may keep their place or neighbour from one order to another: 1 on average, more once in 3e12."""
FEW = 20
"""With fewer images two orders are easily alike: there many are looked at."""
ORDER, TRAINER = "ddpm_fast/data/batches.py or ddpm_fast/diffusion/noise.py", "ddpm_fast/engine/trainer.py"


def check_examples(config: Config, dataset: Dataset, device: torch.device, full: bool = False) -> Iterator[CheckResult]:
    """Check the order of the data, through the functions that feed training.

    Args:
        config: the run's.
        dataset: the run's.
        device: where batches are wanted.
        full: look at every image, however many there are.
    """
    images = len(dataset.images) if full else min(len(dataset.images), QUICK_IMAGES)
    numbered = _numbered(images)
    if 0 < config.data.holdout < 1 / images:  # of fewer images than there are, one at least
        config = replace(config, data=replace(config.data, holdout=1 / images))
    shape, expected = tuple(_source(config, numbered, device).batch(0, 1)[0].shape), (1, 1, 1, 4)
    if shape != expected:  # then no number can be read
        name, source = "a batch of images of 1x4 pixels is [N, C, H, W]", ORDER.split()[0]
        yield CheckResult("data", name, judged(False), f"{expected}", f"{shape}", source)
        return
    yield from check_epochs(config, numbered, device)
    yield _check_images(config, dataset, device)
    yield _check_steps(config, numbered, device)


def _numbered(images: int) -> Dataset:
    """Return a data set of M images of 1x4 pixels, which are the bytes of its number."""
    return Dataset(np.arange(images, dtype="<u4").view(np.uint8).reshape(images, 1, 4, 1), "", "numbers")


def _numbers(images: Tensor) -> Tensor:
    """Read the numbers [n] that images [n, 1, 1, 4] hold."""
    return (images[:, 0, 0].long() << torch.tensor([0, 8, 16, 24], device=images.device)).sum(1)


def _source(config: Config, dataset: Dataset, device: torch.device, more_seed: int = 0) -> BatchSource:
    key = key_from_seed((config.training.seed + more_seed) % 2**64)
    return BatchSource(dataset, key, device, config.data.holdout)


def _visited(source: BatchSource, first: int, n: int, batch: int) -> Tensor:
    """Return which images examples first .. first + n - 1 are, taken batch by batch."""
    starts = range(first, first + n, batch)
    return torch.cat([_numbers(source.batch(at, min(batch, first + n - at))[0]) for at in starts]).cpu()


def check_epochs(config: Config, numbered: Dataset, device: torch.device) -> Iterator[CheckResult]:
    """Check that every epoch visits all images once, in an order unlike the last's, the data's and another seed's.

    All but those that are held out, which no seed ever visits.
    """
    total, held_out = len(numbered.images), round(len(numbered.images) * config.data.holdout)
    count = total - held_out
    epochs = 3 if count >= FEW else 64
    batch = max(config.training.batch_size, count // 50 + 1)  # batches straddle epochs, as in training
    orders = _visited(_source(config, numbered, device), 0, epochs * count, batch).view(epochs, count)
    times = torch.stack([order.clamp(0, total - 1).bincount(minlength=total) for order in orders])
    seen = times.sum(0) > 0
    never, wrong = count - int(seen.sum()), int((times != 1).sum()) - epochs * held_out
    name, expected = "every epoch visits all images once", f"{count} images" + f", {held_out} held out" * bool(held_out)
    found = f"{never} are never seen, {wrong - never * epochs} times one is missing from an epoch or repeated in it"
    yield CheckResult("order", name, judged(not wrong), expected, found if wrong else expected, ORDER)
    others = [
        _visited(_source(config, numbered, device, more), 0, epochs * count, batch).view(epochs, count)
        for more in OTHER_SEEDS
    ]
    if held_out:
        evaluated = split(total, config.data.holdout)[1]
        name, expected = "what is held out is evaluated alone, for every seed", f"{len(evaluated)} images"
        leaked = max(int(torch.isin(evaluated, visited).sum()) for visited in (orders, *others))
        found = f"{leaked} of them are trained on" if leaked else expected
        yield CheckResult("order", name, judged(not leaked), expected, found, ORDER)
    name, expected = "every epoch has an order of its own", "unlike the last one's, the data's and another seed's"
    place = seen.cumsum(0) - 1  # of each image among those that are trained on
    found = _likeness(*(place[visited.clamp(0, total - 1)] for visited in (orders, *others)))
    yield CheckResult("order", name, judged(not found), expected, found or expected, ORDER)
    middle = count // 3
    again = _visited(_source(config, numbered, device), (epochs - 1) * count + middle, count - middle, batch)
    name, expected = "the order can be entered anywhere", "the images of a run that was never stopped"
    right = torch.equal(again, orders[-1, middle:])
    yield CheckResult("order", name, judged(right), expected, expected if right else "other images", ORDER)


def _likeness(orders: Tensor, *other_seeds: Tensor) -> str:
    """Say which orders are too much alike, or nothing."""
    count = orders.shape[1]
    if count < FEW:
        alike = [("all epochs", orders[1:] == orders[:-1]), *(("two seeds", orders == other) for other in other_seeds)]
        return next((f"{which} are alike" for which, same in alike if count > 1 and bool(same.all())), "")
    data = torch.arange(count)
    pairs = {f"epochs {epoch} and {epoch + 1}": (orders[epoch], orders[epoch + 1]) for epoch in range(len(orders) - 1)}
    pairs |= {
        f"two seeds {more} apart": (orders[0], other[0]) for more, other in zip(OTHER_SEEDS, other_seeds, strict=True)
    }
    pairs["an epoch and the data"] = (data, orders[0])
    for which, (a, b) in pairs.items():
        place = torch.zeros_like(a).scatter_(0, a.clamp(0, count - 1), data)[
            b.clamp(0, count - 1)
        ]  # in a, of b's images
        kept = max(int((place == data).sum()), int((place.diff() == 1).sum()))
        if kept > MOST_KEPT:
            return f"{kept} of {count} images keep their place or neighbour between {which}"
        centred = place.double() - (count - 1) / 2
        correlation = float((centred * (data - (count - 1) / 2)).mean() * 12 / (count**2 - 1))
        if of_sigmas(correlation * count**0.5) < RARE:
            return f"{which} are alike: a correlation of {correlation:.2f}"
    return ""


def _check_steps(config: Config, numbered: Dataset, device: torch.device) -> CheckResult:
    """Check that step s trains on the examples s * N .. s * N + N - 1, where it starts, and where an epoch ends."""
    size, count = config.training.batch_size, len(numbered.images)
    source = _source(config, numbered, device)
    trainer = Trainer(with_least_unet(config, (1, 1, 4)), source.batch, device)
    wrong = []
    for step in sorted({0, 1, 2, count // size}):
        trainer.step = step
        trainer.load_batch()
        expected = torch.arange(step * size, (step + 1) * size, device=device)
        images = _visited(_source(config, numbered, device), step * size, size, size)
        right = torch.equal(trainer.sample_index, expected) and torch.equal(_numbers(trainer.images).cpu(), images)
        wrong += [] if right and int(trainer.numbers.step) == step else [step]
    name, expected = "each step trains on the next examples", f"{size} more for each step"
    found = f"others in step {wrong[0]}" if wrong else expected
    return CheckResult("order", name, judged(not wrong), expected, found, TRAINER)


def _check_images(config: Config, dataset: Dataset, device: torch.device) -> CheckResult:
    """Check that batches hold the store's own images, with rows, columns and channels in their places."""
    count = len(dataset.images)
    n = max(1, min(count, config.training.batch_size, 2**22 // dataset.images[0].size))
    source, numbers = _source(config, dataset, device), _source(config, _numbered(count), device)
    wrong = 0
    for first in (0, n, max(0, count - n // 2)):
        images, sample_index, *_ = source.batch(first, n)
        expected = torch.from_numpy(dataset.images[_visited(numbers, first, n, n).numpy()]).permute(0, 3, 1, 2)
        same = images.cpu() == expected if images.shape == expected.shape else torch.zeros(n, 1, 1, 1, dtype=torch.bool)
        wrong += int((~same.all(dim=(1, 2, 3))).sum())
        wrong += int((sample_index.cpu() != torch.arange(first, first + n)).sum())
    name, expected = "batches hold the images of the data set", f"{3 * n} images, bit for bit"
    return CheckResult("data", name, judged(not wrong), expected, f"{wrong} of {3 * n} otherwise", ORDER.split()[0])
