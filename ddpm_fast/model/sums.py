"""Feature maps that are not added up before they are read: the reader, if it is a norm's kernel, does so in passing.

Shapes: N images, C channels, H x W pixels.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Sum:
    """A feature map x + added + bias [N, C, H, W]."""

    def __init__(self, x: Tensor, added: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Take the terms: x and added [N, C, H, W], bias [C]."""
        self.x, self.added, self.bias = x, added, bias
        self.value: Tensor | None = None  # once somebody has added up

    @property
    def shift(self) -> Tensor | None:
        """The bias, as norms take it: [N, C]."""
        return None if self.bias is None else self.bias.expand(len(self.x), -1)


FeatureMap = Tensor | Sum


def value_of(x: FeatureMap) -> Tensor:
    """Return the feature map added up, which is done once."""
    if not isinstance(x, Sum):
        return x
    if x.value is None:
        x.value = x.x if x.added is None else x.x + x.added
        x.value = x.value if x.bias is None else x.value + x.bias.to(x.value.dtype)[:, None, None]
    return x.value


class ConvBeforeNorm(nn.Conv2d):
    """A convolution whose output norms read first: they may add its bias, as one term of a sum."""

    leaves_sums = False

    def leave_sums(self) -> None:
        """Return the output as a sum with the bias from now on."""
        self.leaves_sums = True

    def forward(self, input: Tensor) -> FeatureMap:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self.leaves_sums:
            return super().forward(input)
        return Sum(F.conv2d(input, self.weight, None, self.stride, self.padding), bias=self.bias)
