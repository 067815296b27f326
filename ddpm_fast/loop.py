"""Running a sampler's K steps.

Shapes: N images, C channels, H x W pixels, K steps, S the U-Net's time shifts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_fast import ops
from ddpm_fast.config import MathematicsError
from ddpm_fast.noise import NoiseAddress, Stream, key_from_seed, normal
from ddpm_fast.samplers import Row, SamplerTable
from ddpm_fast.unet import UNet


@dataclass(frozen=True)
class ImageRange:
    """Which images to make: numbers first .. first + count - 1 of a seed."""

    seed: int
    first: int
    count: int

    def batches(self, largest: int) -> list[Tensor]:
        """Split into batches of one size, at most `largest`; the last is padded by images past the end.

        One size, because convolutions choose other algorithms at other shapes: bits stay equal in one shape.
        """
        number = -(-self.count // largest)
        size = -(-self.count // number)
        return [self.first + i * size + torch.arange(size) for i in range(number)]


class Loop:
    """A sampler's loop over one U-Net; what all batches share is computed once."""

    def __init__(self, unet: UNet, table: SamplerTable, dtype: torch.dtype = torch.float32) -> None:
        """Prepare the loop.

        Args:
            unet: whose weights to sample from, on the device to run on.
            table: the sampler.
            dtype: of the U-Net's arithmetic.
        """
        self.unet, self.table, self.dtype = unet, table, dtype
        self.device = unet.conv_in.weight.device
        self.rows = table.rows.to(self.device, torch.float32)
        with torch.no_grad():
            # t is known in advance, so the whole time-embedding path is computed once for all K rows.
            self.time_shifts = unet.time_shifts(self.rows[:, Row._fields.index("t")].contiguous())

    @torch.no_grad()
    def run(self, address: NoiseAddress, on_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Sample one batch (Ho et al. 2020, Algorithm 2).

        Args:
            address: key and image numbers [N], on the loop's device.
            on_step: called after each step with its number 0..K-1 and x.

        Returns:
            [N, C, H, W] float32.
        """
        config, count = self.unet.config, len(address.sample_index)
        shape = (config.image_channels, config.height, config.width)
        # Channels-last convolutions measured faster than NCHW on GPUs and on CPUs alike.
        x = normal(address, 0, Stream.SAMPLING, shape).to(memory_format=torch.channels_last)
        model_input = x.to(self.dtype)
        x0 = torch.zeros_like(x) if self.table.multistep else None
        step = torch.zeros(1, dtype=torch.int64, device=self.device)
        enabled = self.dtype != torch.float32
        for k in range(len(self.rows)):
            with torch.autocast(self.device.type, self.dtype, enabled=enabled):
                out = self.unet.denoise(model_input, self.time_shifts.index_select(0, step).expand(count, -1))
            ops.reverse_step(
                x,
                out,
                self.rows,
                step,
                address.key,
                address.sample_index,
                clip=self.table.clip,
                noisy=self.table.noisy,
                x0=x0,
                model_input=model_input,
                kernels=self.unet.kernels,
            )
            step += 1
            if on_step is not None:
                on_step(k, x)
        return x


def sample(
    loop: Loop,
    images: ImageRange,
    largest_batch: int = 64,
    progress: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Make images of a seed, in equal batches.

    Returns:
        [count, C, H, W] float32 on the CPU.

    Raises:
        MathematicsError: a value is not finite.
    """
    key = key_from_seed(images.seed, loop.device)
    batches = images.batches(largest_batch)
    steps = len(loop.rows)
    made = []
    with tqdm(total=steps * len(batches), unit="step", desc="sampling", disable=not progress, leave=False) as bar:
        for sample_index in batches:

            def advance(k: int, x: Tensor) -> None:
                bar.update()
                if on_step is not None:
                    on_step(k, x)

            made.append(loop.run(NoiseAddress(key, sample_index.to(loop.device)), advance).cpu())
    x = torch.cat(made)[: images.count]
    if not torch.isfinite(x).all():
        raise MathematicsError("a sampled value is not finite: the weights are broken, or bf16 overflowed")
    return x
