"""The engine's ops at the U-Net's shapes, each with the least bytes it must move.

What is run are the cases by which kernels are checked. One call of an op's work runs the op on several sets of inputs,
together larger than the device's cache: over and over on one set, it is the cache that would be measured.
Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch

from bench.timing.clock import Clock
from ddpm_fast.checks import kernels as check_kernels
from ddpm_fast.checks.kernels import Case, Inputs, Op
from ddpm_fast.checks.norms import norms as norms_of
from ddpm_fast.config import Config
from ddpm_fast.ops import REFERENCE, fused_ops

MOST_SETS = 32
"""Sets of inputs of one op at most: small shapes fit in any cache, in the engine's loop as well."""


@dataclass(frozen=True)
class OpWork:
    """An op at one shape."""

    case: Case
    sets: tuple[Inputs, ...]
    moved: int
    """Least bytes of one call: each input read once, each output written once."""
    operations: int
    """Arithmetic of one call, about, for its place in the roofline."""
    count: int = 1
    """How often one step of the U-Net runs this."""

    @property
    def op(self) -> str:
        """The op's name in the engine."""
        return self.case.op

    @property
    def name(self) -> str:
        """The op's name in tables."""
        norm = self.case.norm
        name = self.op if norm is None or norm.silu else "group_norm"
        return name + (", forward and backward" if self.case.direction == "backward" else "")

    @property
    def shape(self) -> str:
        """The shape in words."""
        norm = self.case.norm
        return "x".join(map(str, self.case.shape)) + (" with shift" if norm is not None and norm.shift else "")

    def work(self, op: Op) -> Callable[[], object]:
        """Return what is timed: `op`, a form of this op, once on each set."""

        def run() -> None:
            for inputs in self.sets:
                self.case.run(op, inputs)

        return run


def forms(op: str, kernels: bool, compiled: bool) -> dict[str, Op]:
    """Return an op in plain PyTorch, and as asked what torch.compile makes of that and the Triton kernel."""
    found: dict[str, Op] = {"reference": getattr(REFERENCE, op)}
    if compiled:
        found["compiled reference"] = torch.compile(found["reference"], dynamic=False)
    if kernels:
        found["kernel"] = getattr(fused_ops(), op)
    return found


# Arithmetic per element, counted by hand: a normal takes about 25 integer operations of Philox and 15 of Box-Muller.
OPERATIONS = {
    ("q_sample", ""): 45,
    ("noise_mse", "forward"): 50,
    ("noise_mse", "backward"): 100,
    ("group_norm_silu", "forward"): 12,
    ("group_norm_silu", "backward"): 36,
    ("group_norm_silu_and_residual", "forward"): 12,
    ("group_norm_silu_and_residual", "backward"): 37,
    ("timestep_embedding", ""): 20,
    ("reverse_step", ""): 50,
    ("adam_ema", ""): 20,
}


def moved_per_element(case: Case) -> int:
    """Return the bytes that each element of a case's shape costs; backward includes forward."""
    size, norm = case.dtype.itemsize, case.norm
    joined = norm is not None and norm.residual and (norm.beside > 0 or norm.added or norm.shift)
    return {
        ("q_sample", ""): 1 + size,  # uint8 images; x_t
        ("noise_mse", "forward"): 1 + size,  # uint8 images and the prediction
        ("noise_mse", "backward"): 2 * (1 + size) + size,  # the same twice, and the gradient
        ("group_norm_silu", "forward"): 2 * size,  # x; y
        ("group_norm_silu", "backward"): 5 * size,  # x; y; x and dy; dx
        # the same, the gradient past the branch, and what is added up or joined; a second term is left out
        ("group_norm_silu_and_residual", "forward"): (2 + joined) * size,
        ("group_norm_silu_and_residual", "backward"): (6 + joined) * size,
        ("timestep_embedding", ""): size,
        # x, read and written, the prediction and, in lower precision, the U-Net's next input
        ("reverse_step", ""): 8 + (4 if case.dtype == torch.float32 else 2 * size),
        # the gradient, twice as its norm comes first; weights, moments and average, read and written; the copy
        ("adam_ema", ""): 8 + 32 + (0 if case.dtype == torch.float32 else size),
    }[case.op, case.direction]


def build(case: Case, clock: Clock, count: int = 1) -> OpWork:
    """Make a case's inputs, so many times that they do not fit in the device's cache."""
    elements = prod(case.shape)
    moved = elements * moved_per_element(case)
    sets = tuple(case.make() for _ in range(min(MOST_SETS, 1 + 2 * clock.cache_bytes() // max(moved, 1))))
    return OpWork(case, sets, moved, elements * OPERATIONS[case.op, case.direction], count)


def _key(case: Case) -> str:
    norm, backward = case.norm, "-backward" if case.direction == "backward" else ""
    if norm is None:
        return case.op + backward
    flags = {"shift": norm.shift, "silu": norm.silu, "residual": norm.residual, "added": norm.added}
    flags["beside"] = norm.beside > 0
    options = "".join(f"-{name}" for name, present in flags.items() if present)
    return f"group_norm-{norm.channels}x{norm.height}x{norm.width}{options}{backward}"


def builders(
    config: Config, n: int, dtype: torch.dtype, clock: Clock, norms: int | None = None
) -> dict[str, Callable[[], OpWork]]:
    """Return every op at the shapes that one step on n images has; nothing is allocated until one is built.

    The norms come first, without dropout as in sampling, those that move the most bytes in a step before the others.

    Args:
        norms: only so many of the GroupNorms, those that move the most; None is all.
    """
    config = replace(config, unet=replace(config.unet, dropout=0.0))
    counted = norms_of(config.unet) | norms_of(config.unet, sampling=True)
    by_bytes = sorted(counted, key=lambda norm: -counted[norm] * norm.channels * norm.height * norm.width)
    places = {norm: place for place, norm in enumerate(by_bytes[:norms])}
    cases = check_kernels.cases(config, n, clock.device, dtype)
    chosen = [case for case in cases if case.norm is None or case.norm in places]
    chosen.sort(key=lambda case: len(places) if case.norm is None else places[case.norm])
    return {_key(case): partial(build, case, clock, 1 if case.norm is None else counted[case.norm]) for case in chosen}
