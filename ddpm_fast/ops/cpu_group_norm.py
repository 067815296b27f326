"""GroupNorm in plain PyTorch, also where groups are narrow, on a CPU and NHWC: PyTorch's own is slow there.

A channel's sums over pixels come first, by plain reductions that read NHWC in order; a group then adds up its few
channels. Shapes: N images, C channels, G groups, H x W pixels.
"""

from typing import Any

import torch
from torch import Tensor


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute `torch.nn.functional.group_norm`, by `narrow_group_norm` where that is faster, or the only way.

    Without its refusal of a single image with groups of a single number, which are left with their bias.
    """
    ours = pays_for(x, groups) or ends_pytorch(x, weight, bias)
    return (narrow_group_norm if ours else torch.group_norm)(x, groups, weight, bias, eps)


def ends_pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Return whether PyTorch's own backward pass would end the process.

    On a CPU it ends in a segmentation fault where x is NHWC and needs no gradient, but weight or bias does: behind a
    layer that is frozen or detached (seen in PyTorch 2.11 and 2.13).
    """
    parameters_learn = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    return x.device.type == "cpu" and parameters_learn and not x.requires_grad


def pays_for(x: Tensor, groups: int) -> bool:
    """Return whether `narrow_group_norm` is the faster one for x: eagerly, on a CPU, at these shapes.

    Below 1,024 pixels PyTorch takes a group of an image at a time, whose few channels lie far apart in NHWC. Forward
    and backward on 2 cores: 64 images of 32x16x16 in 32 groups 8.2 ms, here 1.5; 16 of 128x28x28 6.4 and 4.6. With 8
    channels a group (64x8x8 in 8 groups: 0.3 and 0.8 ms) or small images the launches here cost more than they gain.
    """
    narrow, few_pixels = x.shape[1] // groups <= 4, x.shape[2] * x.shape[3] < 1024
    eager_on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager_on_cpu and narrow and few_pixels and x.numel() >= 1 << 18


def _of_channels(group_values: Tensor, channels: int) -> Tensor:
    """Repeat [N, G] for each channel of a group: [N, C, 1, 1]."""
    return group_values.repeat_interleave(channels // group_values.shape[1], dim=1)[:, :, None, None]


def _group_means(channel_means: Tensor, groups: int) -> Tensor:
    """Average [N, C] over each group's channels: [N, G]."""
    return channel_means.unflatten(1, (groups, -1)).mean(2)


class _NarrowGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        channels = x.shape[1]
        centred = x - _of_channels(_group_means(x.mean((2, 3)), groups), channels)
        variance = _group_means(centred.square().mean((2, 3)), groups)
        rstd = _of_channels((variance + eps).rsqrt(), channels)
        ctx.save_for_backward(centred, rstd, weight)
        ctx.groups = groups
        return torch.addcmul(bias[:, None, None], centred, rstd * weight[:, None, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # With n = centred * rstd and g = dy * weight: dx = rstd * (g - mean(g) - n * mean(g * n)), means over a group.
        (dy,), (centred, rstd, weight) = grad_outputs, ctx.saved_tensors
        channels, pixels = dy.shape[1], dy.shape[2] * dy.shape[3]
        dy_mean = dy.mean((2, 3))
        dy_n_mean = (dy * centred).mean((2, 3)) * rstd[:, :, 0, 0]
        g_mean = _of_channels(_group_means(dy_mean * weight, ctx.groups), channels)
        g_n_mean = _of_channels(_group_means(dy_n_mean * weight, ctx.groups), channels)
        dx = torch.addcmul(-rstd * g_mean, centred, -rstd.square() * g_n_mean)
        dx.addcmul_(dy, rstd * weight[:, None, None])
        return dx, None, dy_n_mean.sum(0) * pixels, dy_mean.sum(0) * pixels, None


def narrow_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute `torch.nn.functional.group_norm`, with statistics in two passes; differentiable once.

    Args:
        x: [N, C, H, W] float32 or float64, in any layout.
        groups: G, which divides C.
        weight, bias: [C].
        eps: added to the variance.

    Returns:
        [N, C, H, W] in x's dtype and layout.
    """
    result = _NarrowGroupNorm.apply(x, groups, weight, bias, eps)
    assert isinstance(result, Tensor)
    return result
