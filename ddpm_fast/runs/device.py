"""The device that a command runs on: one line where it is missing or its memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddpm_fast.config import Precision
from ddpm_fast.engine.execution import choose_device, disable_malloc_trim, set_tf32
from ddpm_fast.engine.memory import free_memory, is_out_of_memory
from ddpm_fast.errors import InputError, NotEnoughMemoryError, require


def prepare_device(name: str, precision: Precision) -> torch.device:
    """Return the device, set to compute in that precision.

    Raises:
        InputError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no NVIDIA GPU that this PyTorch can use; leave the flag out")
    set_tf32(precision)
    disable_malloc_trim()
    return choose_device(name)


def require_precision(precision: Precision, device: torch.device) -> None:
    """Refuse TF32 where it would be ignored.

    Raises:
        InputError: it is asked for on another device than a GPU.
    """
    require(
        precision != "tf32" or device.type == "cuda",
        f"--precision tf32 is an NVIDIA GPU's, and this is computed on {device}: leave it out, or say --precision fp32",
    )


@contextmanager
def enough_memory(device: torch.device, batch_size: int) -> Iterator[None]:
    """Turn running out of a device's memory into one line, and give back what was taken.

    Raises:
        NotEnoughMemoryError: memory did not suffice.
    """
    try:
        yield
        return
    except Exception as error:
        if isinstance(error, InputError) or not is_out_of_memory(error):
            raise
    free_memory()  # out here, since the error held what was computed
    other = "--precision bf16" if device.type == "cuda" else "a smaller network (--channels)"
    raise NotEnoughMemoryError(
        f"{device} has too little memory for --batch-size {batch_size}: take a smaller one, or {other}"
    )
