"""What a time means: images/s, TFLOP/s and GB/s, and their shares of what this machine can reach."""

from dataclasses import dataclass
from typing import Any

import torch

from bench.timing.clock import Clock, measure, warm_up
from bench.timing.timings import Timings
from bench.work.amounts import unet_bytes, unet_flop
from bench.work.scenarios import Scenario


@dataclass(frozen=True)
class Ceilings:
    """The two rates that nothing on this machine exceeds by much, as measured."""

    copy_gb_per_s: float
    """Bytes read plus bytes written by a large copy on the device."""
    matrix_tflop_per_s: float
    """A large matrix product of random numbers, 2 FLOPs for a multiply and an add."""
    dtype: str
    """Of the matrix product: the loop's."""


def copy_rate(clock: Clock, seconds: float, megabytes: int) -> Timings:
    """Measure GB/s of copying a tensor on the device, bytes read plus bytes written."""
    source = torch.rand(megabytes * 2**18, device=clock.device)  # float32
    target = torch.empty_like(source)
    warm_up(lambda: target.copy_(source), clock)
    taken = measure(lambda: target.copy_(source), clock, seconds)
    return taken.map(lambda t: 2 * source.nbytes / t / 1e9)


def matrix_rate(clock: Clock, seconds: float, dtype: torch.dtype, side: int) -> Timings:
    """Measure TFLOP/s of a square matrix product; random operands, since on zeros a GPU runs faster than on data."""
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    warm_up(lambda: torch.mm(a, b, out=out), clock)
    taken = measure(lambda: torch.mm(a, b, out=out), clock, seconds)
    return taken.map(lambda t: 2 * side**3 / t / 1e12)


def rates(seconds: float, flop: float, moved: float, ceilings: Ceilings | None) -> dict[str, float]:
    """Return TFLOP/s and GB/s of work that took `seconds`, with their shares of the ceilings where known.

    Args:
        seconds: of one call.
        flop: FLOPs of one call; 0 leaves them out.
        moved: least bytes of one call; 0 leaves them out.
        ceilings: None where they were not measured.
    """
    found = {}
    if flop:
        found["tflop_per_s"] = flop / seconds / 1e12
        if ceilings:
            found["share_of_matrix_rate"] = found["tflop_per_s"] / ceilings.matrix_tflop_per_s
    if moved:
        found["gb_per_s"] = moved / seconds / 1e9
        if ceilings:
            found["share_of_copy_rate"] = found["gb_per_s"] / ceilings.copy_gb_per_s
    return found


def scenario_figures(
    scenario: Scenario, taken: Timings, dtype: torch.dtype, ceilings: Ceilings | None
) -> dict[str, Any]:
    """Return what is said of a training step or a sampling loop that took `taken` seconds per call."""
    passes = scenario.steps * scenario.images
    flop = unet_flop(scenario.unet, scenario.training) * passes
    moved = unet_bytes(scenario.unet, scenario.images, scenario.training, dtype) * scenario.steps
    return {
        "images": scenario.images,
        "steps": scenario.steps,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": taken.to_json(),
        "seconds_per_step": taken.map(lambda t: t / scenario.steps).to_json(),
        "images_per_s": scenario.images / taken.median,
        "flop": flop,
        "moved": moved,
        **rates(taken.median, flop, moved, ceilings),
    }
