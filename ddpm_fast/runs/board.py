"""TensorBoard's copy of metrics and grids. A disk that is full for it ends no run: metrics.jsonl has the same."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_fast.progress import say


class Board:
    """Writes for TensorBoard, as its SummaryWriter does, until that fails; a context."""

    def __init__(self, run: Path, step: int) -> None:
        """Begin behind a step, from which the run starts again."""
        self._directory, self._step = run / "tensorboard", step
        self._writer: Any = None

    def __enter__(self) -> "Board":
        self._report_thread, threading.excepthook = threading.excepthook, self._thread_failed
        self._trying(self._open)
        return self

    def __exit__(self, *exception: object) -> None:
        self._trying(lambda: self._writer and self._writer.close())
        threading.excepthook = self._report_thread

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # which sampling and checking have no use for

        self._writer = SummaryWriter(str(self._directory), purge_step=self._step)

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Pass on what ends a thread, unless it is the writer's, which raises the same again where it is called."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
            self._report_thread(failed)

    def _trying(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            self._writer = None
            say(f"warning: {self._directory} is written no more: {error.strerror or error}; metrics.jsonl has the same")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point of a curve."""
        self._trying(lambda: self._writer and self._writer.add_scalar(name, value, step))

    def add_images(self, name: str, images: Any, step: int, dataformats: str = "NCHW") -> None:
        """Add a grid of images [N, C, H, W], or as `dataformats` says."""
        self._trying(lambda: self._writer and self._writer.add_images(name, images, step, dataformats=dataformats))

    def flush(self) -> None:
        """Write what is waiting to be written."""
        self._trying(lambda: self._writer and self._writer.flush())
