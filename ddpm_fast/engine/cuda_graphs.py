"""CUDA graphs: work that the GPU repeats without being told each time.

The work must read and write tensors at fixed addresses and take nothing from the host; whatever changes from one replay
to the next is written into those tensors before. It must not wait for the device either.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]

CAPTURING = threading.Lock()
"""One capture at a time in a process, in whichever thread: each begins by waiting for the whole device."""


class GraphBackend(Protocol):
    """Captures work. Tests pass a stand-in where there is no GPU."""

    def warm_up(self, work: Work) -> None:
        """Run work once before it is captured: compilers, autotuners and library handles do their once-only work."""
        ...

    def capture(self, work: Work) -> Work:
        """Return what repeats the work; the graph's memory lives as long as that does."""
        ...


class CudaGraphs:
    """Graphs on one device that share one pool of memory, since they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        # One for all: the allocator keeps memory per stream, and each further one would hold the warm-ups' again.
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, work: Work) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                work()
        finally:  # what was launched still runs where the work ended early
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that copies the next batch ahead may allocate and copy meanwhile.
        captured = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        outside = torch.cuda.current_stream(self.device)
        try:
            with CAPTURING, torch.cuda.device(self.device), captured:
                work()
        except BaseException:  # PyTorch leaves its stream in place where a capture cannot be ended
            torch.cuda.set_stream(outside)
            raise
        return graph.replay


def memory_of(device: torch.device) -> int:
    """Return the bytes that PyTorch holds on a GPU, graphs included; 0 elsewhere."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


class InFlight:
    """Tracks launches in flight: reports each as it completes, and keeps the host at most two ahead.

    So a progress bar tells the truth, and the GPU always has work waiting. Without a listener nothing is waited for.
    """

    AHEAD = 2

    def __init__(self, device: torch.device, on_progress: Callable[[int], object] | None) -> None:
        self.on_progress, self.on_gpu = on_progress, device.type == "cuda"
        self.waiting: deque[tuple[int, torch.cuda.Event | None]] = deque()

    def add(self, steps: int) -> None:
        """Note that work of so many steps was launched."""
        if self.on_progress is None:
            return
        event = None
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((steps, event))
        if event is None or len(self.waiting) > self.AHEAD:
            self._report_oldest()

    def finish(self) -> None:
        """Wait for what is left."""
        while self.waiting:
            self._report_oldest()

    def _report_oldest(self) -> None:
        steps, event = self.waiting.popleft()
        if event is not None:
            event.synchronize()
        if self.on_progress is not None:
            self.on_progress(steps)
