"""Which image each training example is, and batches of them on the device.

Shapes: M images of the data set, N images of a batch, C channels, H x W pixels.
"""

import warnings
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import key_from_seed, permutation
from ddpm_fast.errors import InputError

DEVICE_SHARE = 4
"""The store moves to the GPU if it takes at most one part in this many of its free memory."""
HOLDOUT_SEED = 0x686F6C64
"""Of which images are held out: the same ones in all runs."""


def split(count: int, holdout: float) -> tuple[Tensor, Tensor]:
    """Return which of M images are trained on, and which are held out: two tensors of int64 in ascending order.

    Raises:
        InputError: a share of the images is to be held out, and either part would be empty.
    """
    held_out = round(count * holdout)
    if holdout and not 0 < held_out < count:
        raise InputError(f"--holdout {holdout} of {count} images leaves none on one side: take another share, or 0")
    if not held_out:
        return torch.arange(count), torch.empty(0, dtype=torch.int64)
    order = permutation(key_from_seed(HOLDOUT_SEED), 0, count)
    return order[held_out:].sort().values, order[:held_out].sort().values


class ExampleOrder:
    """Which image each training example is: every epoch visits all images once, in an order of its own."""

    def __init__(self, key: Tensor, count: int) -> None:
        """Take the seed's key [2] and the number of images M, at least 1."""
        if count < 1:
            raise ValueError(f"an order of {count} images: there must be at least 1")
        self.key, self.count = key, count
        self._orders: dict[int, Tensor] = {}

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = permutation(self.key, epoch, self.count)
        return self._orders[epoch]

    def indices(self, first_example: int, n: int) -> Tensor:
        """Return the images of examples first_example .. first_example + n - 1: [n] int64 in 0..M-1.

        A batch may straddle epochs; each example still belongs to its own.
        """
        parts, example, end = [], first_example, first_example + n
        while example < end:
            epoch, position = divmod(example, self.count)
            stop = min(self.count, position + end - example)
            parts.append(self._order(epoch)[position:stop])
            example += stop - position
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.key.device)


class BatchSource:
    """Training batches on the device: the store moves there where it fits, else the next batch is copied ahead."""

    def __init__(
        self,
        dataset: Dataset,
        key: Tensor,
        device: torch.device,
        holdout: float = 0,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        """Prepare the images, and their labels where a U-Net is told them.

        Args:
            dataset: whose images to take.
            key: of the seed, [2].
            device: where batches are wanted.
            holdout: share of the images that never come.
            labels: of all images of the data set, [M].

        Raises:
            InputError: nothing would be held out, or nothing would come.
        """
        self.device = device
        with warnings.catch_warnings():  # the store is read-only, and shared without a copy: nobody writes to it
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.store = torch.from_numpy(dataset.images)
        self.ahead = None
        if device.type == "cuda":
            if self.store.nbytes * DEVICE_SHARE <= torch.cuda.mem_get_info(device)[0]:
                self.store = self.store.to(device)
            else:
                self.ahead = CopyAhead(self.store, device)
        trained, held_out = split(len(dataset), holdout)
        self.rows = trained.to(self.store.device) if len(held_out) else None  # None: all, in their own order
        self.order = ExampleOrder(key.to(self.store.device), len(trained))
        self.labels = None if labels is None else torch.from_numpy(labels).to(self.store.device)

    def _rows(self, first_example: int, n: int) -> Tensor:
        """Return where in the store the examples' images are: [n] int64."""
        indices = self.order.indices(first_example, n)
        return indices if self.rows is None else self.rows[indices]

    def batch(self, first_example: int, n: int) -> tuple[Tensor, ...]:
        """Return images [n, C, H, W] uint8, laid out as NHWC, the examples' numbers [n] int64, and any labels [n]."""
        indices = self._rows(first_example, n)
        if self.ahead is None:
            rows = self.store[indices]
        else:
            rows = self.ahead.take(indices)
            self.ahead.prepare(self._rows(first_example + n, n))
        numbers = torch.arange(first_example, first_example + n, device=self.device)
        labels = () if self.labels is None else (self.labels[indices].to(self.device),)
        return rows.permute(0, 3, 1, 2), numbers, *labels


class CopyAhead:
    """Rows of a store in the host's memory, gathered and copied to a GPU while it computes on the ones before.

    A thread gathers the rows into pinned memory, from where the copy runs on a stream of its own; who takes them makes
    the GPU wait for that copy, not the host.
    """

    def __init__(self, store: Tensor, device: torch.device) -> None:
        """Take the store [M, H, W, C] and the GPU."""
        self.store, self.device = store, device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.worker = ThreadPoolExecutor(1)
        self.next: tuple[Tensor, Future[tuple[Tensor, torch.cuda.Event | None]]] | None = None

    def prepare(self, indices: Tensor) -> None:
        """Begin to gather and copy rows [n] that are likely to be taken next."""
        self.next = (indices, self.worker.submit(self._copy, indices))

    def take(self, indices: Tensor) -> Tensor:
        """Return rows [n, H, W, C] on the device; quick if they are those that were prepared."""
        if self.next is None or not torch.equal(self.next[0], indices):
            self.prepare(indices)
        assert self.next is not None
        rows, copied = self.next[1].result()
        self.next = None
        if copied is not None:
            copied.wait(torch.cuda.current_stream(self.device))
            rows.record_stream(torch.cuda.current_stream(self.device))
        return rows

    def _copy(self, indices: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        rows = torch.empty((len(indices), *self.store.shape[1:]), dtype=self.store.dtype, pin_memory=self.on_gpu)
        torch.index_select(self.store, 0, indices, out=rows)
        with torch.cuda.stream(self.stream):  # of None: does nothing
            on_device = rows.to(self.device, non_blocking=True)
            copied = torch.cuda.Event() if self.on_gpu else None
            if copied is not None:
                copied.record(self.stream)
        return on_device, copied
