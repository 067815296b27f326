"""The engine's six ops, and the one place that chooses how they are computed.

Every op exists twice under one name and one signature: in plain PyTorch (`reference`) and as Triton kernels (`fused`).
A set of the six is chosen once, held by the U-Net as `unet.ops`, and used by all that trains it or samples from it.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ddpm_fast.ops import reference

RULE = "on an NVIDIA GPU every op runs its Triton kernel at every shape (no GPU has been measured yet), else PyTorch"
"""Which ops run kernels unless --no-kernels is given; to be narrowed by measurements in `profiles/`."""


@dataclass(frozen=True)
class Ops:
    """The six ops, each computed in the same way; `reference` says what they take and return."""

    q_sample: Callable[..., Tensor]
    noise_mse: Callable[..., Tensor]
    group_norm_silu: Callable[..., Tensor]
    group_norm_silu_and_residual: Callable[..., tuple[Tensor, Tensor]]
    """The same op where a residual connection reads x, too."""
    timestep_embedding: Callable[..., Tensor]
    reverse_step: Callable[..., None]
    adam_ema: Callable[..., None]
    fused: bool
    """Whether they are Triton kernels, in which a compiler has nothing left to fuse."""

    def __deepcopy__(self, memo: object) -> "Ops":
        """Return itself: a copy of a network shares its ops, which have no state."""
        return self


REFERENCE = Ops(
    reference.q_sample,
    reference.noise_mse,
    reference.group_norm_silu,
    reference.group_norm_silu_and_residual,
    reference.timestep_embedding,
    reference.reverse_step,
    reference.adam_ema,
    fused=False,
)
"""Plain PyTorch."""


@cache
def fused_ops() -> Ops:
    """Return the ops as Triton kernels; imports Triton, which is optional."""
    from ddpm_fast.ops.fused import FUNCTIONS

    return Ops(**FUNCTIONS, fused=True)


def choose_ops(kernels: bool, device: torch.device) -> Ops:
    """Return the ops to run on a device, by `RULE`; kernels: False for plain PyTorch everywhere (--no-kernels)."""
    if kernels and device.type == "cuda" and importlib.util.find_spec("triton"):
        return fused_ops()
    return REFERENCE
