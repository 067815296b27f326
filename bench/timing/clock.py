"""Timing work on a device: one interface, a host clock for a CPU, events for a CUDA GPU.

Device work is asynchronous: a clock that is read without waiting measures the launches. Each clock also knows its
device's peak memory and how large a cache is, since work that fits in it measures the cache.
"""

import ctypes
import gc
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bench.timing.timings import Timings
from ddpm_fast.engine.cuda_graphs import CudaGraphs

Work = Callable[[], object]
"""One call is what is timed."""

SHORTEST_SECONDS = 2e-3
"""Work is repeated within a sample until it takes this long: clocks and events resolve about a microsecond."""


class Clock:
    """Times work on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Wait until all work given to the device is done: on a CPU it always is."""

    def now(self) -> float:
        """Return seconds on the host's clock, once the device is idle; a timer for pytest-benchmark."""
        self.synchronize()
        return time.perf_counter()

    def seconds(self, work: Work, calls: int = 1) -> float:
        """Run work `calls` times and return the seconds per call."""
        start = self.now()
        for _ in range(calls):
            work()
        return (self.now() - start) / calls

    def captured(self, work: Work) -> Work:
        """Return the same work without the cost of launching it, where the device can: a CPU launches nothing."""
        return work

    def cache_bytes(self) -> int:
        """Return the size of the last cache before memory."""
        sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max((int(size.strip().rstrip("K")) * 1024 for size in sizes), default=32 * 2**20)

    def forget_peak(self) -> None:
        """Measure the peak of memory from now on."""
        path = Path("/proc/self/clear_refs")
        if path.exists() and os.access(path, os.W_OK):
            path.write_text("5")  # Linux: resets the process's VmHWM

    def peak_bytes(self) -> int | None:
        """Return the most memory in use since `forget_peak`: the process's on a CPU. None: it cannot be told."""
        status = Path("/proc/self/status")
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
        return int(found[1]) * 1024 if found else None

    def start_afresh(self) -> None:
        """Drop what earlier work left behind: memory, its peak, and compiled code.

        PyTorch compiles one function for eight shapes at most and then runs it from Python without a word.
        """
        if "torch._dynamo" in sys.modules:  # importing it takes a second
            torch.compiler.reset()
        self.return_memory()
        self.forget_peak()

    def return_memory(self) -> None:
        """Return what nothing uses to the device."""
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's, which `disable_malloc_trim` holds back
            trim(0)


class CudaClock(Clock):
    """Times work on a CUDA GPU by events, which the device itself stamps."""

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, work: Work, calls: int = 1) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.synchronize()
        start.record()
        for _ in range(calls):
            work()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def captured(self, work: Work) -> Work:
        """Return the replay of a graph of the work: short kernels are otherwise hidden behind their launches."""
        graphs = CudaGraphs(self.device)

        def run() -> None:
            work()

        for _ in range(3):
            graphs.warm_up(run)
        return graphs.capture(run)

    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Return the most memory that the allocator held, which counts the pools of captured graphs."""
        return torch.cuda.max_memory_reserved(self.device)

    def return_memory(self) -> None:
        gc.collect()  # cycles hold tensors too
        torch.cuda.empty_cache()


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else Clock(device)


def warm_up(work: Work, clock: Clock, calls: int = 1) -> float:
    """Run work until compilation, allocation and caches are behind it; return the first call's seconds."""
    first = clock.seconds(work)
    for _ in range(calls - 1):
        work()
    clock.synchronize()
    return first


def interleave(works: Mapping[str, Work], clock: Clock, seconds: float, least: int = 3) -> dict[str, Timings]:
    """Time several works in turns, so that a drift of the machine meets them all alike.

    Args:
        works: by name, warmed up; one more call of each tells how often to repeat it.
        clock: of their device.
        seconds: to spend on all of them together; the rounds end when it is spent.
        least: rounds, even if they take longer.

    Returns:
        Seconds per call of each, as many samples as there were rounds.
    """
    start = time.monotonic()
    calls = {name: max(1, math.ceil(SHORTEST_SECONDS / clock.seconds(work))) for name, work in works.items()}
    taken: dict[str, list[float]] = {name: [] for name in works}
    rounds = 0
    while rounds < least or time.monotonic() - start < seconds:
        # Every other round runs backwards: who comes after whom is then no constant advantage.
        for name in list(works)[:: 1 if rounds % 2 == 0 else -1]:
            taken[name].append(clock.seconds(works[name], calls[name]))
        rounds += 1
    return {name: Timings(tuple(values)) for name, values in taken.items()}


def measure(work: Work, clock: Clock, seconds: float, least: int = 3) -> Timings:
    """Time one work, warmed up, for about `seconds`: seconds per call."""
    return interleave({"work": work}, clock, seconds, least)["work"]
