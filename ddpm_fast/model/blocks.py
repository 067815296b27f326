"""The U-Net's blocks (Ho et al. 2020, Appendix B), named as diffusers' UNet2DModel names its parameters.

Shapes: N images, C channels, H x W pixels of the feature map, D width of the time embedding.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.constants import GROUP_NORM_EPS
from ddpm_fast.diffusion.noise import NoiseAddress
from ddpm_fast.model.sums import ConvBeforeNorm, FeatureMap, Sum, value_of
from ddpm_fast.ops import REFERENCE
from ddpm_fast.ops.reference import Dropout

FEWEST_PIXELS = 512
"""Pixels of a batch from which on adding weights up in every call pays, forward and backward (measured on a CPU)."""

Layer = TypeVar("Layer", nn.Linear, nn.ConvTranspose2d)


class FusedGroupNorm(nn.Module):
    """GroupNorm with its affine parameters, then SiLU unless told otherwise; see `reference.group_norm_silu`."""

    def __init__(self, channels: int, groups: int, silu: bool = True) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups")
        self.groups, self.silu = groups, silu
        self.ops, self.eps = REFERENCE, GROUP_NORM_EPS  # the U-Net sets what it uses
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, shift: Tensor | None = None, dropout: Dropout | None = None) -> Tensor:
        options = {"shift": shift, "silu": self.silu, "dropout": dropout, "eps": self.eps}
        return self.ops.group_norm_silu(x, self.weight, self.bias, self.groups, **options)


class ResidualGroupNorm(FusedGroupNorm):
    """The norm at the head of a residual branch; see `reference.group_norm_silu_and_residual`."""

    def forward(self, x: FeatureMap, skip: FeatureMap | None = None) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the branch's input, and x, with the skip connection's channels, for the connection past the branch."""
        options = {"silu": self.silu, "eps": self.eps, "beside": None if skip is None else value_of(skip)}
        if not isinstance(x, Sum) or x.value is not None:
            x = value_of(x)
            return self.ops.group_norm_silu_and_residual(x, self.weight, self.bias, self.groups, **options)
        options |= {"added": x.added, "shift": x.shift}
        y, value = self.ops.group_norm_silu_and_residual(x.x, self.weight, self.bias, self.groups, **options)
        x.value = value if skip is None else None  # which skip connections read
        return y, value


class ConvBeforeShift(nn.Conv2d):
    """A 3x3 convolution without its bias, which the time embedding's shift brings: see `UNet.time_shifts`.

    A bias of its own before a norm that no compiler sees into is a pass over the whole map, and another backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, None, self.stride, self.padding)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv; + time shift; GroupNorm, SiLU, dropout, conv; + shortcut."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = ResidualGroupNorm(channels_in, groups)
        self.conv1 = ConvBeforeShift(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, channels_out)
        self.norm2 = FusedGroupNorm(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None
        self.dropout = dropout
        self.layer = 0  # this block's number in forward order, dropout's address; set by the U-Net
        self.sum_bias: nn.Parameter | None = None  # of both terms that the block ends with, if it leaves them apart

    def leave_sums(self) -> None:
        """Return the last sum as its terms from now on, the convolutions' biases as a term of their own."""
        layers = [layer for layer in (self.conv2, self.conv_shortcut) if layer is not None]
        self.sum_bias = nn.Parameter(torch.stack([layer.bias for layer in layers if layer.bias is not None]).sum(0))
        for layer in layers:
            layer.bias = None

    def forward(
        self,
        x: FeatureMap,
        shift: Tensor,
        dropout_address: NoiseAddress | None = None,
        skip: FeatureMap | None = None,
    ) -> FeatureMap:
        """Transform x [N, C, H, W] given this block's shift [N, C_out] of `UNet.time_shifts`, and a skip connection."""
        dropout = None
        if dropout_address is not None and self.dropout > 0:
            dropout = Dropout(self.dropout, *dropout_address, self.layer)
        h, past = self.norm1(x, skip)
        h = self.conv2(self.norm2(self.conv1(h), shift, dropout))
        past = past if self.conv_shortcut is None else self.conv_shortcut(past)
        return h + past if self.sum_bias is None else Sum(h, past, self.sum_bias)


class Attention(nn.Module):
    """Self-attention over pixels, residual."""

    def __init__(self, channels: int, groups: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = ResidualGroupNorm(channels, groups, silu=False)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.joined: nn.Linear | None = None  # the three in one, where they lie side by side in memory
        self.leaves_sums = False

    def leave_sums(self) -> None:
        """Return the last sum as its terms from now on."""
        self.leaves_sums = True

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Return the weights [3 * C, C] and biases [3 * C] of q, k and v, one below the other: one product for all."""
        layers = (self.to_q, self.to_k, self.to_v)
        return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])

    def freeze(self) -> None:
        """Stack the weights once, instead of in every call."""
        channels = self.to_q.in_features
        self.joined = constant(nn.Linear(channels, 3 * channels, device="meta"), *self.stacked())

    def join(self, weight: Tensor, bias: Tensor) -> None:
        """Compute, and learn, with weights and biases that are `stacked` already, in place of the three layers."""
        self.joined = nn.Linear(self.to_q.in_features, len(bias), device="meta")
        self.joined.weight, self.joined.bias = nn.Parameter(weight), nn.Parameter(bias)
        del self.to_q, self.to_k, self.to_v

    @property
    def output(self) -> nn.Linear:
        """The output projection; a list of one in the checkpoint's names."""
        return cast(nn.Linear, self.to_out[0])

    def forward(self, x: FeatureMap) -> FeatureMap:
        h, past = self.group_norm(x)
        height, width = h.shape[2:]
        pixels = h.flatten(2).transpose(1, 2)  # [N, H*W, C]
        qkv = F.linear(pixels, *self.stacked()) if self.joined is None else self.joined(pixels)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [N, heads, H*W, D], scale D^-0.5
        h = self.output(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (height, width))
        return Sum(h, past) if self.leaves_sums else past + h


def constant(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """Return the layer, which was made on no device, with these weights for good."""
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
    return layer.requires_grad_(False)


class Downsample(nn.Module):
    """Halve H and W by a strided convolution, padded on the right and bottom, as TensorFlow's SAME, or all round."""

    def __init__(self, channels: int, all_round: bool = False) -> None:
        super().__init__()
        self.conv = ConvBeforeNorm(channels, channels, 3, stride=2, padding=int(all_round))

    def forward(self, x: FeatureMap) -> FeatureMap:
        x = value_of(x)
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by repeating pixels, then a 3x3 convolution.

    An output pixel then sees 2x2 pixels of x, some of them repeatedly. With the weights of equal pixels added up it is
    a transposed convolution, of 4/9 of the multiplications, and the repeated pixels are never in memory.
    """

    def __init__(self, channels: int, transposed: bool = True) -> None:
        super().__init__()
        self.conv = ConvBeforeNorm(channels, channels, 3, padding=1)
        self.transposed = transposed
        self.frozen: nn.ConvTranspose2d | None = None

    def freeze(self) -> None:
        """Add the weights up once, in their own precision, instead of in every call."""
        if self.transposed:
            channels = self.conv.in_channels
            layer = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False, device="meta")
            self.frozen = constant(layer, added_up(self.conv.weight), None)

    def forward(self, x: FeatureMap) -> FeatureMap:
        x = value_of(x)
        if self.frozen is not None:
            if self.conv.leaves_sums:
                return Sum(self.frozen(x), bias=self.conv.bias)
            return F.conv_transpose2d(x, self.frozen.weight, self.conv.bias, stride=2, padding=1)
        if self.transposed and len(x) * x.shape[2] * x.shape[3] >= FEWEST_PIXELS:
            return F.conv_transpose2d(x, added_up(self.conv.weight), self.conv.bias, stride=2, padding=1)
        # Not F.interpolate: compiled, its gradient is atomic additions in any order, and comes back as NCHW.
        pixels = x.permute(0, 2, 3, 1)  # [N, H, W, C]
        wide = torch.stack((pixels, pixels), dim=3).flatten(2, 3)
        return self.conv(torch.stack((wide, wide), dim=2).flatten(1, 2).permute(0, 3, 1, 2))


def added_up(weight: Tensor) -> Tensor:
    """Turn a convolution of repeated pixels into a transposed one: weights [C_out, C, 3, 3] -> [C, C_out, 4, 4].

    Pixel 2 * i + e of the repeated map is pixel i, for e of 0 and 1. By tap k it adds to output 2 * i + e + 1 - k,
    which is tap e + 2 - k of the transposed convolution. Sums are of float32.
    """
    reverse = weight.to(torch.promote_types(weight.dtype, torch.float32)).permute(0, 2, 3, 1).flip(1, 2)
    taps = F.pad(reverse, (0, 0, 1, 1, 1, 1))  # [C_out, 5, 5, C]
    taps = taps[:, :-1] + taps[:, 1:]
    taps = taps[:, :, :-1] + taps[:, :, 1:]
    return taps.permute(3, 0, 1, 2).to(weight.dtype, memory_format=torch.channels_last)


class BlockList(nn.ModuleList):
    """A ModuleList of ResBlocks, known to type checkers as such."""

    if TYPE_CHECKING:  # Dynamo of PyTorch 2.11 cannot unpack a list with an `__iter__` of its own

        def __iter__(self) -> Iterator[ResBlock]: ...  # pyright: ignore[reportIncompatibleMethodOverride]


class Level(nn.Module):
    """One resolution on the way down or up: ResBlocks, each followed by attention if the level has it."""

    def __init__(
        self, blocks: list[ResBlock], attentions: list[Attention], resize: Downsample | Upsample | None
    ) -> None:
        super().__init__()
        self.resnets = BlockList(blocks)
        self.attentions = nn.ModuleList(attentions)
        if isinstance(resize, Downsample):
            self.downsamplers = nn.ModuleList([resize])
        elif resize is not None:
            self.upsamplers = nn.ModuleList([resize])
        self.has_resize = resize is not None

    def blocks(self) -> Iterator[tuple[ResBlock, nn.Module]]:
        """Yield each ResBlock with the attention, or nothing, that follows it."""
        nothing = nn.Identity()
        yield from zip(self.resnets, self.attentions or [nothing] * len(self.resnets), strict=True)


class LevelList(nn.ModuleList):
    """A ModuleList of Levels, known to type checkers as such."""

    if TYPE_CHECKING:  # as for `BlockList`

        def __iter__(self) -> Iterator[Level]: ...  # pyright: ignore[reportIncompatibleMethodOverride]


class MiddleBlock(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, blocks: list[ResBlock], attention: Attention) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([attention])
        self.resnets = BlockList(blocks)

    def forward(
        self, x: FeatureMap, shifts: Iterator[Tensor], dropout_address: NoiseAddress | None = None
    ) -> FeatureMap:
        first, second = self.resnets
        x = first(x, next(shifts), dropout_address)
        return second(self.attentions[0](x), next(shifts), dropout_address)


def xavier_uniform(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Initialise as the original code does: uniform, variance gain / fan average; zero bias.

    A gain of 0 is taken as 1e-10, which starts a residual branch at almost nothing but lets it learn.
    """
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(gain or 1e-10))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
