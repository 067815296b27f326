"""What a run costs before it is started: time and memory, from its network's FLOPs and what its gradient keeps."""

import functools
from dataclasses import replace

import torch

from ddpm_fast.config import Config, UNetConfig
from ddpm_fast.engine.speed import Machine
from ddpm_fast.model.unet import UNet

HALF_SPEED_CHANNELS = 24
"""Channels at which a U-Net trains at half the speed of wide blocks. Measured on a CPU: shares of 0.53 at 32, 0.70 at
48, 0.80 at 64 and 0.77 at 128 channels; a GPU's have not been measured."""
BYTES_PER_PARAMETER = 28
"""Weights, average, gradient and Adam's two averages in float32, and the largest of them once more while it is made."""
OVERHEAD = 1.3
"""By which memory exceeds what is kept for the gradient: what one op needs beside it."""
FIXED_BYTES = {"cpu": 0.4e9, "cuda": 1.2e9}
"""Of PyTorch itself, and of a GPU's libraries."""


@functools.cache
def flop_per_image(unet: UNetConfig) -> float:
    """Estimate the FLOPs of one image in training: forwards, and twice that backwards. Labels cost next to nothing."""
    with torch.device("meta"):
        return 3.0 * UNet(replace(unet, num_classes=0)).estimate_flop()


@functools.cache
def kept_bytes(unet: UNetConfig) -> tuple[float, float]:
    """Return the bytes of all parameters' own state, and what one image's gradient needs to be kept, in float32.

    The latter is added up in a forward pass on PyTorch's device "meta", which computes nothing.
    """
    kept = dict[int, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"):
        network = UNet(replace(unet, num_classes=0))
        image = torch.zeros(1, unet.image_channels, unet.height, unet.width)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = network(image, torch.zeros(1, dtype=torch.long))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    del result  # up to here all that is kept has an address of its own
    return float(BYTES_PER_PARAMETER * parameters), float(sum(kept.values()))


def memory(unet: UNetConfig, images: int, kind: str) -> float:
    """Estimate the bytes that training takes, with so many images at once; bfloat16, which GPUs take, halves less."""
    state, per_image = kept_bytes(unet)
    return FIXED_BYTES[kind] + state + OVERHEAD * images * per_image


def seconds_per_image(unet: UNetConfig, machine: Machine) -> float:
    """Estimate the time in which one image is trained on."""
    share = unet.channels / (unet.channels + HALF_SPEED_CHANNELS)
    return flop_per_image(unet) / (machine.flop_per_second * share)


def seconds(config: Config, machine: Machine) -> float:
    """Estimate the time in which a run takes all its steps."""
    return seconds_per_image(config.unet, machine) * config.training.batch_size * config.training.steps
