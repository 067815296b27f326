"""What the launchers refuse: a ValueError names the argument, says what it is, and what the kernel takes.

Shapes: N images, C channels, H x W pixels.
"""

import torch
from torch import Tensor
from triton import knobs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_IMAGE = 2**31 - 2**16
"""Elements of an image, so that an offset within it, and to the end of its last tile, fits in 32 bits."""
LARGEST_GRID = 2**31 - 1


def check_device(name: str, value: Tensor) -> None:
    """Raise ValueError unless kernels run where the tensor lies: a GPU, or a CPU under Triton's interpreter."""
    if not (value.is_cuda or (value.device.type == "cpu" and knobs.runtime.interpret)):
        raise ValueError(f"{name} is on {value.device}: it takes a CUDA device")


def check_dtype(name: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless a dtype is one of those."""
    if dtype not in dtypes:
        raise ValueError(f"{name} is {dtype}: it takes {', '.join(map(str, dtypes))}")


def check(
    name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ValueError unless a tensor has that shape, one of those dtypes, and lies on that device."""
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}: it takes {list(shape)}")
    check_dtype(name, value.dtype, dtypes)
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}: it takes {device}, where the others are")


def check_dense(
    name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ValueError unless `check` passes and the tensor is contiguous."""
    check(name, value, shape, dtypes, device)
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}: it takes a contiguous tensor")


def check_address(key: Tensor, sample_index: Tensor, images: int, device: torch.device) -> None:
    """Raise ValueError unless key is [2] and sample_index [N], both int64, contiguous and on the device."""
    check_dense("key", key, (2,), (torch.int64,), device)
    check_dense("sample_index", sample_index, (images,), (torch.int64,), device)


def image_shape(name: str, value: Tensor) -> tuple[int, int, int, int]:
    """Return N, C, H, W, or raise ValueError for another number of dimensions, an empty or too large an image."""
    check_device(name, value)
    if value.ndim != 4 or not 0 < value.shape[1] * value.shape[2] * value.shape[3] <= LARGEST_IMAGE:
        raise ValueError(f"{name} has shape {list(value.shape)}: it takes [N, C, H, W], C * H * W in 1..2**31 - 2**16")
    return value.shape[0], value.shape[1], value.shape[2], value.shape[3]


def check_images(
    name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ValueError unless `check` passes and the tensor lies as NHWC."""
    check(name, value, shape, dtypes, device)
    if not value.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} has strides {value.stride()}: it takes dense NHWC (channels_last)")


def grid(name: str, value: Tensor, programs: int) -> tuple[int]:
    """Return the grid of that many programs, or raise ValueError where a launch cannot have so many."""
    if programs > LARGEST_GRID:
        raise ValueError(f"{name} has shape {list(value.shape)}, {programs} tiles: it takes at most {LARGEST_GRID}")
    return (programs,)
