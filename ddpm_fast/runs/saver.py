"""Checkpoints written in the background: training waits until its state is copied, and not for the disk.

One is written at a time, by `checkpoint.save`, with all that it promises. What goes wrong there is raised in the
training thread, at its next step or at the end.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ddpm_fast.config import Config
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.retention import delete_superseded

State = Mapping[str, Mapping[str, Tensor]]
"""Tensors by part, "model", "ema" or "optimizer", and name."""
LARGE = 1 << 20
"""Bytes from which memory for a copy is kept for the next one."""


class Snapshot:
    """Copies of a state, in memory that is kept from one to the next: pinned, where a GPU copies into it."""

    def __init__(self) -> None:
        self._copies = dict[int, Tensor]()

    def take(self, state: State) -> dict[str, dict[str, Tensor]]:
        """Return a state's copy, good until the next is taken: tensors that share memory share it there, too."""
        copies = dict[int, Tensor]()
        for tensors in state.values():
            for tensor in tensors.values():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in copies:
                    source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                    copies[storage.data_ptr()] = self._copy(storage.data_ptr(), source)
        self._copies = {address: copy for address, copy in copies.items() if copy.nbytes >= LARGE}
        return {
            part: {name: _like(tensor, copies) for name, tensor in tensors.items()} for part, tensors in state.items()
        }

    def _copy(self, address: int, source: Tensor) -> Tensor:
        if source.nbytes < LARGE:
            return source.to("cpu", copy=True)
        kept = self._copies.get(address)
        if kept is None or kept.nbytes != source.nbytes:
            kept = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=source.device.type == "cuda")
        return kept.copy_(source)


def _like(tensor: Tensor, copies: Mapping[int, Tensor]) -> Tensor:
    """Return the copy of a tensor, a view of the copy of the memory that it lies in."""
    memory = copies[tensor.untyped_storage().data_ptr()].untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


class Saver:
    """Writes the checkpoints of a run; a context, on whose leaving all is on the disk."""

    def __init__(self, run: Path, config: Config, fingerprint: str) -> None:
        """Prepare to write.

        Args:
            run: the run directory.
            config: the run's.
            fingerprint: the data set's.
        """
        self._run, self._config, self._fingerprint = run, config, fingerprint
        self._snapshot, self._worker = Snapshot(), ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._saved_at = time.perf_counter()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Wait for what is being written, unless a signal ended just that: the process then ends after it."""
        self._worker.shutdown(wait=kind is None or not issubclass(kind, KeyboardInterrupt))
        if kind is None:
            self.wait()

    def is_due(self, step: int, last: bool) -> bool:
        """Return whether to save after a step, the run's last or another."""
        training = self._config.training
        minutes = (time.perf_counter() - self._saved_at) / 60
        too_old = 0 < training.save_minutes <= minutes
        return last or step == training.cooldown_start or step % training.save_every == 0 or too_old

    def save(self, step: int, state: State) -> None:
        """Copy a state, once the last one is on the disk, and begin to write it."""
        self.wait()
        parts = self._snapshot.take(state)
        self._saved_at = time.perf_counter()
        self._writing = self._worker.submit(self._write, step, parts)

    def _write(self, step: int, parts: State) -> None:
        checkpoint.save(self._run, step, self._config, self._fingerprint, parts)
        delete_superseded(self._run, self._config.training, step)

    def raise_failure(self) -> None:
        """Raise what went wrong in the background, without waiting.

        Raises:
            InputError: the last checkpoint could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            InputError: it could not be written.
        """
        if self._writing is not None:
            writing = self._writing
            writing.exception()  # waits; a signal that ends the wait leaves it to be waited for
            self._writing = None
            writing.result()
