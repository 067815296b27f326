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


@dataclass(frozen=True)
class Sizes:
    """What is measured on one kind of device."""

    training: tuple[Training, ...]
    sampling: tuple[Sampling, ...]
    ops: Training
    """The network and batch whose shapes the ops are measured at."""
    norms: int | None
    """How many of the GroupNorm shapes, the heaviest first; None is all."""
    copy_megabytes: int
    matrix_side: int
    rounds: int
    """Rounds of one benchmark."""


GPU = Sizes(
    training=(*(Training("cifar10", n) for n in (128, 256, 512, 1024)), Training("digits", 64)),
    sampling=(*(Sampling("cifar10", n, 1000) for n in (1, 16, 256, 1024)), Sampling("digits", 64, 1000)),
    ops=Training("cifar10", 128),
    norms=None,
    copy_megabytes=4096,
    matrix_side=8192,
    rounds=5,
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
)


def sizes_for(device: torch.device) -> Sizes:
    """Return what is measured on a device."""
    return GPU if device.type == "cuda" else CPU
