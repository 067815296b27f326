"""The workbench: one device, what to measure on it, and the instruments to do so."""

from dataclasses import dataclass
from typing import Any

import torch

from bench.report.sizes import Sizes
from bench.timing.clock import Clock, clock_for
from bench.timing.energy import EnergyMeter, energy_meter
from bench.work.figures import Ceilings
from bench.work.scenarios import loop_dtype
from ddpm_fast.engine.execution import disable_malloc_trim

Row = dict[str, Any]
"""A line of the report's tables, ready for JSON."""


@dataclass
class Workbench:
    """What all measurements share."""

    device: torch.device
    sizes: Sizes
    clock: Clock
    meter: EnergyMeter
    dtype: torch.dtype
    ceilings: Ceilings | None = None
    """None until they are measured."""

    @staticmethod
    def at(device: torch.device, sizes: Sizes) -> "Workbench":
        """Set up on a device as the command line does."""
        disable_malloc_trim()
        return Workbench(device, sizes, clock_for(device), energy_meter(device), loop_dtype(device))
