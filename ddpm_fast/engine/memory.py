"""Running out of memory: what it looks like on each device, and doing the same work in smaller parts.

Where a number is computed depends on its address alone, so a smaller part changes nothing but roundings.
"""

import errno
import gc
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ddpm_fast.errors import NotEnoughMemoryError

T = TypeVar("T")

WORDS = re.compile(
    "out of memory|allocate memory|not enough memory|bad_alloc|alloc_failed|could not (create|execute) a primitive$",
    re.I,
)
"""What the messages have in common of PyTorch on CPUs and GPUs, of cuBLAS, cuDNN and C++; the last one is oneDNN's."""
SMALLER = "take --precision bf16, a smaller network (--channels, --res-blocks) or smaller images (--height, --width)"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what it arose from, says that memory did not suffice."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, RuntimeError) and WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_memory() -> None:
    """Give back what nothing but cycles of references, or PyTorch's cache, still holds."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used


def until_it_fits(work: Callable[[], T], less: Callable[[], bool]) -> T:
    """Do work; where memory does not suffice, do it again after `less`, until it does.

    Args:
        work: may fail at any line, and is begun anew.
        less: has it take less; returns False where that cannot be.

    Raises:
        NotEnoughMemoryError: there is no less.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if isinstance(error, NotEnoughMemoryError) or not is_out_of_memory(error):
                raise
        free_memory()  # out here, since the error held all that was computed
        if not less():
            raise NotEnoughMemoryError(f"memory does not suffice, even for one image at a time: {SMALLER}")
        free_memory()


def in_batches_that_fit(
    batches: list[Tensor], work: Callable[[Tensor], T], less: Callable[[int, int], None]
) -> Iterator[tuple[int, T]]:
    """Work through batches of images by their numbers; where one does not fit, through halves of all that are left.

    Args:
        batches: [N] int64 each, all of one size.
        work: on one.
        less: called with the number of halves and their size, before them; of an odd batch one half is smaller.

    Yields:
        The first number of each batch, and what work made of it.

    Raises:
        NotEnoughMemoryError: one image is too much.
    """
    left = list(batches)

    def halve() -> bool:
        size = len(left[0])
        left[:] = [half for batch in left for half in batch.split(-(-size // 2))]
        if size > 1:
            less(len(left), -(-size // 2))
        return size > 1

    while left:
        made = until_it_fits(lambda: work(left[0]), halve)
        yield int(left.pop(0)[0]), made
