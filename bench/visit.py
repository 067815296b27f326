"""One run of the report on one device: what measurements share, and what they cost before they are made."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.clock import Clock, clock_for
from bench.energy import EnergyMeter, energy_meter
from bench.engine import Variant, loop_dtype
from bench.figures import Ceilings
from bench.sizes import Sizes, sizes_for
from bench.work import unet_flop
from ddpm_fast.config import Config
from ddpm_fast.engine.execution import keep_freed_memory

Row = dict[str, Any]
"""A line of the report's tables, ready for JSON."""

GUESSED_TFLOP_PER_S = {"cuda": 200.0, "cpu": 0.1}
"""Matrix rate before it is measured."""
SHARE = 0.3
"""Share of the matrix rate that a U-Net is assumed to reach."""
LAUNCH_SECONDS = {"cuda": 0.02, "cpu": 0.005}
"""Least time of an eager pass through a U-Net: its launches."""
COMPILE_SECONDS = {"cuda": 60.0, "cpu": 70.0}
"""Of a U-Net's first compiled pass; a training step, with its backward pass, takes about twice that."""


@dataclass
class Visit:
    """The device, how to time on it, and what has been learned of it so far."""

    device: torch.device
    sizes: Sizes
    clock: Clock
    meter: EnergyMeter
    dtype: torch.dtype
    ceilings: Ceilings | None = None

    @staticmethod
    def to(device: torch.device) -> "Visit":
        """Start on a device, set up as the command line does."""
        keep_freed_memory()
        return Visit(device, sizes_for(device), clock_for(device), energy_meter(device), loop_dtype(device))

    def step_seconds(self, config: Config, images: int, training: bool) -> float:
        """Estimate one step of a batch."""
        kind = self.device.type
        rate = self.ceilings.matrix_tflop_per_s if self.ceilings else GUESSED_TFLOP_PER_S[kind]
        return unet_flop(config.unet, training) * images / (rate * 1e12 * SHARE) + LAUNCH_SECONDS[kind]

    def cost(self, config: Config, images: int, steps: int, training: bool, variant: Variant) -> float:
        """Estimate the seconds that building, warming up and timing a scenario take."""
        call = self.step_seconds(config, images, training) * steps
        compiling = 0.0 if variant.mode == "eager" else COMPILE_SECONDS[self.device.type] * (2 if training else 1)
        return compiling + 1 + 2 * call + max(self.sizes.seconds, 3 * call)


@dataclass(frozen=True)
class Measurement:
    """One entry of the plan."""

    name: str
    group: str
    cost: Callable[[], float]
    """Estimated seconds, asked for when its turn comes: the ceilings are known by then."""
    run: Callable[[], list[Row]]


@dataclass
class Budget:
    """Seconds to spend; what would exceed them is not begun."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.now()

    def left(self) -> float:
        """Return the seconds left."""
        return self.seconds - (self.now() - self.start)
