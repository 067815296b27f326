"""How much a U-Net must compute and move: what measured times are divided into.

Counted on the meta device, where tensors have shapes and no values: nothing is computed. FLOPs are those of
convolutions and matrix products, 2 for a multiply and an add (`torch.utils.flop_counter`): the paper's CIFAR-10 U-Net
has 12.44 GFLOP per image forward. Bytes are the least that an unfused network moves: each convolution, linear layer
and GroupNorm reads its input and its weights once and writes its output once. The network is the plain one, which
repeats pixels before a convolution: a form that multiplies less then shows as a higher rate.
Shapes: N images, C channels, H x W pixels.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast.config import UNetConfig
from ddpm_fast.model.blocks import Attention, FusedGroupNorm
from ddpm_fast.model.forms import Forms
from ddpm_fast.model.unet import UNet


def _meta_pass(config: UNetConfig, training: bool, hook: Any = None) -> None:
    with torch.device("meta"):
        unet = UNet(config, Forms(transposed_upsampling=False))
        x = torch.empty(1, config.image_channels, config.height, config.width)
        t = torch.zeros(1, dtype=torch.int64)
    if hook is not None:
        for module in unet.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | FusedGroupNorm | Attention):
                module.register_forward_hook(hook)
    with torch.set_grad_enabled(training):
        out = unet(x, t)
    if training:
        out.sum().backward()


@cache
def unet_flop(config: UNetConfig, training: bool) -> int:
    """Return the FLOPs per image of a forward pass, or of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        _meta_pass(config, training)
    return counter.get_total_flops()


@cache
def unet_elements(config: UNetConfig) -> tuple[int, int]:
    """Return the activations per image that layers read and write, and the weights that they read, in elements."""
    activations, weights = 0, 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        nonlocal activations, weights
        if isinstance(module, Attention):  # its q, k and v: one product, of which no module is called
            activations += 4 * inputs[0].numel()
            weights += sum(tensor.numel() for tensor in module.stacked())
            return
        output = output[0] if isinstance(output, tuple) else output  # a norm may hand its input on, too
        read = output if isinstance(module, FusedGroupNorm) else inputs[0]  # a norm may join two inputs
        activations += read.numel() + output.numel()
        weights += sum(parameter.numel() for parameter in module.parameters())

    _meta_pass(config, training=False, hook=add)
    return activations, weights


def unet_bytes(config: UNetConfig, images: int, training: bool, dtype: torch.dtype) -> int:
    """Return the least bytes of one pass over a batch; the backward pass moves about twice what the forward does."""
    activations, weights = unet_elements(config)
    return (activations * images + weights) * dtype.itemsize * (3 if training else 1)


@cache
def parameters(config: UNetConfig) -> int:
    """Return the number of the U-Net's parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())
