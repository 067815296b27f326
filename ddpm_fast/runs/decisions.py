"""What "auto" and the machine decided when a run began: kept in its config.json, and decided again by no resume.

It changes roundings: one thread against two changes a loss by 7e-8. So a run that is continued, or judged against
another, computes as that one did where the machine allows it.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ddpm_fast.config import TrainingConfig
from ddpm_fast.engine.execution import Execution, choose_device, choose_dtype, choose_execution
from ddpm_fast.engine.threads import USERS, choose_threads
from ddpm_fast.errors import InputError, require_types
from ddpm_fast.files import parse_json, replace_file


@dataclass(frozen=True)
class Decisions:
    """How a run computes."""

    device: Literal["cpu", "cuda"]
    """Where."""
    precision: Literal["fp32", "tf32", "bf16"]
    """The U-Net's arithmetic."""
    threads: int
    """Of the CPU."""
    compiled: bool
    """By torch.compile."""
    captured: bool
    """As a CUDA graph."""
    accumulate: int
    """Parts of a batch, one after the other."""

    def __post_init__(self) -> None:
        require_types(self)

    def __str__(self) -> str:
        """Say it in words."""
        threads = f" ({self.threads} thread{'s' * (self.threads > 1)})" if self.device == "cpu" else ""
        return f"{self.device}{threads}, {self.precision}, {self.execution}"

    @property
    def execution(self) -> Execution:
        return Execution(self.compiled, self.captured)


def decide(training: TrainingConfig) -> Decisions:
    """Return what the flags mean on this machine, with the threads that PyTorch has now."""
    device = choose_device(training.device)
    execution = choose_execution(training.compile, training.capture, device)
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if choose_dtype("auto", device) == torch.bfloat16 else "fp32"
    kind = "cuda" if device.type == "cuda" else "cpu"
    threads = torch.get_num_threads()
    return Decisions(kind, precision, threads, execution.compiled, execution.captured, training.accumulate)


def read(run: Path) -> Decisions | None:
    """Return what a run decided; None where its config.json does not say."""
    try:
        return Decisions(**parse_json((run / "config.json").read_text())["decided"])
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None


def keep_accumulate(run: Path, parts: int) -> None:
    """Note in a run's config.json in how many parts its batches are from now on.

    Raises:
        InputError: it cannot be written.
    """
    if read(run) is not None:
        values = parse_json((run / "config.json").read_text())
        values["decided"]["accumulate"] = parts
        replace_file(run / "config.json", (json.dumps(values, indent=2) + "\n").encode())


def settle(training: TrainingConfig, earlier: Decisions | None) -> tuple[Decisions, Sequence[str]]:
    """Decide how to compute, and set the number of threads.

    Args:
        training: the flags, which win.
        earlier: what was decided before, if anything was.

    Returns:
        The decisions, and a line for each that must differ from the earlier one.
    """
    if earlier is None:
        if choose_device(training.device).type == "cpu":
            choose_threads()
        return decide(training), ()
    differing = _set_threads(earlier) if earlier.device == "cpu" else []
    now = decide(training)
    if now.device != earlier.device:
        asked = "as asked" if training.device != "auto" else f"since there is no {earlier.device} here"
        differing.append(f"on {earlier.device} before, now on {now.device}, {asked}")
        return now, differing
    precision = earlier.precision if training.precision == "auto" else now.precision
    divides = training.batch_size % earlier.accumulate == 0
    parts = max(now.accumulate, earlier.accumulate if divides else 1)  # more, where memory did not suffice for fewer
    return replace(now, precision=precision, accumulate=parts), differing


def _set_threads(earlier: Decisions) -> list[str]:
    """Set the number of threads as it was, unless the user or the machine decides; say so where it differs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    users = next((name for name in USERS if name in os.environ), None)
    if users is None:
        torch.set_num_threads(min(earlier.threads, cores))
    now = torch.get_num_threads()
    if now == earlier.threads:
        return []
    return [f"{earlier.threads} threads before, now {now}, by " + (users or f"the {cores} cores that are here")]
