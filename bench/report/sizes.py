"""How much is measured on which device: everything on a GPU, what minutes allow on a CPU."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Training(NamedTuple):
    """A training step to measure."""

    configuration: str
    batch: int


class Sampling(NamedTuple):
    """A sampling loop to measure: K steps on one batch."""

    configuration: str
    batch: int
    steps: int


class Scaling(NamedTuple):
    """How time grows with batch, image size and steps: one is varied, the others stay."""

    configuration: str
    batch: int
    steps: int
    batches: tuple[int, ...]
    sides: tuple[int, ...]
    """Heights and widths of the images, in pixels."""
    step_counts: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """What is measured on one kind of device; the most important first."""

    training: tuple[Training, ...]
    sampling: tuple[Sampling, ...]
    """By the benchmarks, for as long as it takes."""
    ops: Training
    """The network and batch whose shapes the ops are measured at."""
    norms: int | None
    """How many of the GroupNorm shapes, the heaviest first; None is all."""
    copy_megabytes: int
    matrix_side: int
    rounds: int
    """Rounds of one benchmark."""

    report_sampling: tuple[Sampling, ...]
    """By the report, in its minutes: fewer steps where they take long, since all steps cost the same."""
    report_training: tuple[Training, ...]
    more_training: tuple[Training, ...]
    """When all that matters more is measured."""
    varied: Sampling
    """On which variants of the loop are compared: small enough that launches tell."""
    peer_training: tuple[Training, ...]
    peer_sampling: tuple[Sampling, ...]
    scaling: Scaling
    seconds: float
    """That one timing of the report takes, if three rounds do not take longer."""


GPU = Sizes(
    training=(*(Training("cifar10", n) for n in (128, 256, 512, 1024)), Training("digits", 64)),
    sampling=(*(Sampling("cifar10", n, 1000) for n in (1, 16, 256, 1024)), Sampling("digits", 64, 1000)),
    ops=Training("cifar10", 128),
    norms=None,
    copy_megabytes=4096,
    matrix_side=8192,
    rounds=5,
    report_sampling=(Sampling("cifar10", 256, 100), Sampling("cifar10", 16, 1000), Sampling("cifar10", 1, 1000)),
    report_training=(Training("cifar10", 128), Training("cifar10", 512)),
    more_training=(Training("digits", 64),),
    varied=Sampling("cifar10", 16, 1000),
    peer_training=(Training("cifar10", 128),),
    peer_sampling=(Sampling("cifar10", 256, 20), Sampling("cifar10", 1, 50), Sampling("cifar10", 16, 50)),
    scaling=Scaling("cifar10", 16, 100, (1, 4, 16, 64, 256, 1024), (32, 64, 128), (10, 100, 1000)),
    seconds=3.0,
)

CPU = Sizes(
    training=(Training("digits", 64), Training("digits-16x16", 64), Training("cifar10", 2)),
    sampling=(
        Sampling("digits", 1, 1000),
        Sampling("digits", 16, 50),
        Sampling("digits", 64, 50),
        Sampling("cifar10", 1, 4),
        Sampling("cifar10", 8, 2),
    ),
    ops=Training("cifar10", 8),
    norms=3,
    copy_megabytes=256,
    matrix_side=2048,
    rounds=3,
    report_sampling=(
        Sampling("digits", 64, 20),
        Sampling("digits", 1, 100),
        Sampling("digits-16x16", 64, 5),
        Sampling("cifar10", 8, 2),
    ),
    report_training=(Training("digits", 64), Training("digits-16x16", 64), Training("cifar10", 8)),
    more_training=(),
    varied=Sampling("digits", 64, 20),
    peer_training=(Training("digits-16x16", 64), Training("digits", 64), Training("cifar10", 8)),
    peer_sampling=(Sampling("digits-16x16", 64, 5), Sampling("digits", 64, 20), Sampling("cifar10", 8, 2)),
    scaling=Scaling("digits-16x16", 4, 10, (1, 4, 16, 64), (16, 32, 64), (10, 30, 100)),
    seconds=5.0,
)

TINY = Sizes(
    training=(),
    sampling=(),
    ops=Training("tiny", 2),
    norms=1,
    copy_megabytes=4,
    matrix_side=64,
    rounds=1,
    report_sampling=(Sampling("tiny", 2, 4), Sampling("tiny", 1, 4)),
    report_training=(Training("tiny", 2),),
    more_training=(),
    varied=Sampling("tiny", 2, 4),
    peer_training=(Training("tiny", 2),),
    peer_sampling=(Sampling("tiny", 2, 2),),
    scaling=Scaling("tiny", 1, 2, (1, 2), (8, 16), (1, 2)),
    seconds=0.01,
)

SIZES = {"cuda": GPU, "cpu": CPU, "tiny": TINY}
"""By kind of device; tiny tries the report itself, in a minute or two."""


def sizes_for(device: torch.device) -> Sizes:
    """Return what is measured on a device."""
    return SIZES[device.type]
