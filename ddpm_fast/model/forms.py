"""Which of several equal forms the U-Net's layers compute in.

Every form gives the same results but for rounding. The defaults are those that move the fewest bytes and multiply the
least, as counted in profiles/launches-sm90.md; none is measured on a GPU yet.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Forms:
    """What `UNet` is built with."""

    transposed_upsampling: bool = True
    """Upsample by a transposed convolution of 4x4, instead of repeating pixels before one of 3x3."""
