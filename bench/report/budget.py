"""What a measurement will cost, before it is made, and the minutes that it must fit into.

All constants are estimates; a report notes the seconds estimated and taken of each measurement.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.report.sizes import Sizes
from bench.report.workbench import Row, Workbench
from bench.work.amounts import unet_flop
from bench.work.figures import Ceilings
from bench.work.scenarios import Mode, Variant, warm_up_calls
from ddpm_fast.config import Config

GUESSED = {"cuda": Ceilings(3000.0, 700.0, "bfloat16"), "cpu": Ceilings(20.0, 0.1, "float32")}
"""The ceilings before they are measured."""
SHARE = 0.3
"""Share of the matrix rate that a U-Net is assumed to reach."""
LAUNCH_SECONDS: dict[str, dict[Mode, float]] = {
    "cuda": {"eager": 0.02, "compiled": 0.02, "captured": 0.001},
    "cpu": {"eager": 0.005, "compiled": 0.005, "captured": 0.005},
}
"""Least time of a pass through a U-Net, however few its images: on a GPU its launches, or the kernels' own latency."""
START_SECONDS = {"cuda": 6.0, "cpu": 4.0}
"""Of a measuring process: importing PyTorch, and a first word with the device."""


class Compiled(NamedTuple):
    """A network that is compiled: for a training step, forward and backward, or for a sampling step."""

    training: bool
    what: str
    """Configuration, batch and kernels, which compiled code is made for."""

    def seconds(self, kind: str, known: bool) -> float:
        """Estimate compiling; code that is known lies in the caches on disk, and is traced and loaded alone."""
        cold, warm = {"cuda": (30.0, 10.0), "cpu": (70.0, 15.0)}[kind]
        return (warm if known else cold) * (2.5 if self.training else 1.0)


def compiled(name: str, batch: int, training: bool, variant: Variant) -> tuple[Compiled, ...]:
    """Return what measuring a variant compiles."""
    kernels = "kernels" if variant.kernels else "reference"
    return () if variant.mode == "eager" else (Compiled(training, f"{name}, batch {batch}, {kernels}"),)


@dataclass(frozen=True)
class Measurement:
    """One entry of the plan."""

    name: str
    group: str
    """Whose table shows it. A group is measured in one process; one that fails is followed by a new process."""
    seconds: Callable[["Costs"], float]
    """Estimates it without compiling and starting a process."""
    run: Callable[[Workbench], list[Row]]
    compiles: tuple[Compiled, ...] = ()


@dataclass
class Costs:
    """Estimates measurements in the order in which they are made."""

    kind: str
    """cuda or cpu."""
    sizes: Sizes
    ceilings: Ceilings | None = None
    known: set[Compiled] = field(default_factory=set)
    """What was compiled before."""
    group: str | None = None
    """Of the process that runs. None: none does."""

    def of(self, measurement: Measurement) -> float:
        """Estimate the seconds that a measurement takes if it is made next."""
        starting = 0.0 if measurement.group == self.group else START_SECONDS[self.kind]
        compiling = sum(one.seconds(self.kind, one in self.known) for one in measurement.compiles)
        return starting + compiling + measurement.seconds(self)

    def made(self, measurement: Measurement, failed: bool = False) -> None:
        """Note that a measurement was made."""
        self.group = None if failed else measurement.group
        if not failed:
            self.known.update(measurement.compiles)

    def step_seconds(self, config: Config, images: int, training: bool, mode: Mode) -> float:
        """Estimate one step of a batch."""
        rate = (self.ceilings or GUESSED[self.kind]).matrix_tflop_per_s * 1e12 * SHARE
        return unet_flop(config.unet, training) * images / rate + LAUNCH_SECONDS[self.kind][mode]

    def scenario(self, config: Config, images: int, steps: int, variant: Variant, training: bool = False) -> float:
        """Estimate building a scenario, warming it up, timing it in three rounds or more, and reading its energy."""
        call = self.step_seconds(config, images, training, variant.mode) * steps
        once = warm_up_calls(variant, training) + 1  # and a call that tells how often to repeat it
        benchmarking = 20.0 if variant.cudnn_benchmark else 0.0
        energy = max(1.0, call) if self.kind == "cuda" else 0.0
        return 2.0 + benchmarking + once * call + max(self.sizes.seconds, 3 * call) + energy


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
