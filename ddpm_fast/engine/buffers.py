"""What a batch of images is sampled in. Shapes: N images, C channels, H x W pixels."""

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise import NoiseAddress, Stream, normal
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.engine.cuda_graphs import Work
from ddpm_fast.model.unet import UNet


class Buffers:
    """A batch size's tensors, at addresses that never change, and the graphs over them."""

    def __init__(self, images: int, unet: UNet, table: SamplerTable, dtype: torch.dtype, device: torch.device) -> None:
        config = unet.config
        shape = (images, config.image_channels, config.height, config.width)
        # NHWC is what the kernels take, and what convolutions on a CPU ran faster on.
        self.x = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.x0 = torch.zeros_like(self.x) if table.multistep else None
        self.x_low_precision = None if dtype == torch.float32 else torch.zeros_like(self.x, dtype=dtype)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.key = torch.zeros(2, dtype=torch.int64, device=device)
        self.sample_index = torch.zeros(images, dtype=torch.int64, device=device)
        self.one_step: Work | None = None
        self.many_steps: Work | None = None

    @property
    def model_input(self) -> Tensor:
        """What the U-Net reads: x, or its copy in lower precision."""
        return self.x if self.x_low_precision is None else self.x_low_precision

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
