"""Guidance: a prediction is carried on beyond where a worse one would leave it.

Without the label, it is worse at what the label says (classifier-free guidance: Ho and Salimans 2022, Equation 6, with
strength 1 + w); by a smaller network, or one trained for less, at everything (autoguidance: Karras et al. 2024).
Shapes: N images, C channels, H x W pixels.
"""

import torch
from torch import Tensor


def guided(own: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Return other + strength * (own - other): at strength 1 own's prediction, beyond it more than that.

    Args:
        own: [N, C, H, W], the prediction to improve.
        other: [N, C, H, W], the worse one.
        strength: [1] float32.

    Returns:
        [N, C, H, W] in own's dtype, computed in float32.
    """
    return torch.lerp(other.float(), own.float(), strength).to(own.dtype)
