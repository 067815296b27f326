"""What a machine can do: its memory, and its speed in what U-Nets are made of, measured in a fraction of a second."""

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from ddpm_fast.engine.execution import choose_dtype
from ddpm_fast.engine.threads import choose_threads

SECONDS = 0.3
"""That measuring takes, after a first time that is not counted."""
BLOCKS = {"cpu": (16, 64, 16), "cuda": (64, 256, 32)}
"""Images, channels, and height and width of the block that is timed: enough work for the device, and little memory."""


@dataclass(frozen=True)
class Machine:
    """Where a run is to be trained."""

    kind: Literal["cpu", "cuda"]
    memory: float
    """Bytes that are free, of the GPU's or of the CPU's memory."""
    flop_per_second: float
    """Of convolutions between norms, forwards and backwards."""


def this_machine(device: torch.device, precision: str) -> Machine:
    """Measure the device, in the U-Net's arithmetic; on a CPU also choose how many threads compute."""
    if device.type == "cpu":
        choose_threads()
        return Machine("cpu", free_bytes(device), measured_speed("cpu", torch.float32))
    return Machine("cuda", free_bytes(device), measured_speed("cuda", choose_dtype(precision, device)))


def free_bytes(device: torch.device) -> float:
    """Return the bytes of a device's memory that are free."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else _cpu_memory()


@functools.cache
def measured_speed(kind: Literal["cpu", "cuda"], dtype: torch.dtype) -> float:
    """Measure, once in a process, the FLOP/s of a block like a U-Net's."""
    images, channels, size = BLOCKS[kind]
    device = torch.device(kind)
    work = _block(images, channels, size, device, dtype)
    flop = 3 * 2 * (2 * 9 * channels * channels * size * size * images)  # backwards costs twice as much as forwards
    return flop / _typical_seconds(work)


def _block(images: int, channels: int, size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a block's work: two norms and convolutions forwards and backwards, whose end is waited for."""
    like = torch.channels_last
    x = torch.full((images, channels, size, size), 0.5, device=device, dtype=dtype).contiguous(memory_format=like)
    weight = torch.full((channels, channels, 3, 3), 0.01, device=device, dtype=dtype).contiguous(memory_format=like)
    weights = [weight.clone().requires_grad_() for _ in range(2)]

    def work() -> None:
        h = x
        for w in weights:
            h = F.conv2d(F.silu(F.group_norm(h, channels // 4)), w, padding=1)
        h.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return work


def _typical_seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the median of the times that work takes; the first, in which memory is taken, does not count."""
    work()
    seconds, started = list[float](), clock()
    while len(seconds) < 3 or clock() - started < SECONDS:
        before = clock()
        work()
        seconds.append(clock() - before)
    return statistics.median(seconds)


def _cpu_memory() -> float:
    """Return the bytes that Linux, or a container's limit, leaves; elsewhere half of all."""
    free = [float("inf")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        free.append(float(int(limit) - int(used)))
    if min(free) == float("inf") and hasattr(os, "sysconf"):
        free.append(0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free)
