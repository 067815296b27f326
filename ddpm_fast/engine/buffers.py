"""Which images are sampled, batch by batch, and the tensors of a batch, at addresses that never change.

Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise import NoiseAddress, Stream, normal
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.engine.cuda_graphs import Work
from ddpm_fast.model.unet import UNet

GUIDANCE = 2.0
"""Before any is asked for: a captured loop is compared with the eager one so."""


class Condition(NamedTuple):
    """What is asked of a batch's images: labels [N] int64, or None for images of none, and how strongly to guide."""

    labels: Tensor | None = None
    guidance: float = 1.0


NOTHING = Condition()


@dataclass(frozen=True)
class ImageRange:
    """Which images to make: numbers first .. first + count - 1 of a seed."""

    seed: int
    first: int
    count: int
    done: Container[int] = ()
    """Numbers that are there already: a batch of nothing else is left out, and the others stay as they were."""
    labels: tuple[int, ...] = ()
    """Image i is of the label labels[i % len(labels)]; without any, of none."""
    guidance: float = 1.0
    """Its strength, see `diffusion.guidance`."""

    def batches(self, largest: int) -> list[Tensor]:
        """Split into batches of one size, at most `largest`; the last is padded by images past the end.

        One size, because convolutions choose other algorithms at other shapes: bits stay equal in one shape.
        """
        number = -(-self.count // largest)
        size = -(-self.count // number)
        firsts = [first for first in range(self.first, self.first + self.count, size) if not self._is_done(first, size)]
        return [first + torch.arange(size) for first in firsts]

    def _is_done(self, first: int, size: int) -> bool:
        return all(number in self.done for number in range(first, min(first + size, self.first + self.count)))

    def condition(self, numbers: Tensor) -> Condition:
        """Return what is asked of the images of these numbers [N]."""
        labels = torch.tensor(self.labels)[numbers % len(self.labels)] if self.labels else None
        return Condition(labels, self.guidance)


class Buffers:
    """A batch size's tensors, at addresses that never change, and the graphs over them."""

    def __init__(
        self, images: int, unet: UNet, table: SamplerTable, dtype: torch.dtype, device: torch.device, no_label: int
    ) -> None:
        config = unet.config
        shape = (images, config.image_channels, config.height, config.width)
        # NHWC is what the kernels take, and what convolutions on a CPU ran faster on.
        self.x = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.x0 = torch.zeros_like(self.x) if table.multistep else None
        self.x_low_precision = None if dtype == torch.float32 else torch.zeros_like(self.x, dtype=dtype)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.key = torch.zeros(2, dtype=torch.int64, device=device)
        self.sample_index = torch.zeros(images, dtype=torch.int64, device=device)
        self.labels = torch.zeros_like(self.sample_index)
        self.no_labels = torch.full_like(self.sample_index, no_label)
        self.guidance = torch.full((1,), GUIDANCE, device=device)
        self.one_step: Work | None = None
        self.many_steps: Work | None = None

    @property
    def model_input(self) -> Tensor:
        """What the U-Net reads: x, or its copy in lower precision."""
        return self.x if self.x_low_precision is None else self.x_low_precision

    def ask(self, condition: Condition) -> None:
        """Write what is asked of the images."""
        self.labels.copy_(self.no_labels if condition.labels is None else condition.labels)
        self.guidance.fill_(condition.guidance)

    def start(self, address: NoiseAddress, row: int = 0) -> None:
        """Write pure noise, the address of all the noise to come, and the row to begin with."""
        self.key.copy_(address.key)
        self.sample_index.copy_(address.sample_index)
        self.step.fill_(row)
        self.x.copy_(normal(address, 0, Stream.SAMPLING, (self.x.shape[1], self.x.shape[2], self.x.shape[3])))
        if self.x_low_precision is not None:
            self.x_low_precision.copy_(self.x)
        if self.x0 is not None:
            self.x0.zero_()
