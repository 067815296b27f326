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

    sums_left_to_norms: bool = True
    """In sampling with kernels, have GroupNorm add up and join what it reads, instead of a pass of its own before it.

    Of 173 launches and 12.9 GB of a step at batch 256 of cifar10 that saves 25 and 1.0 GB, and costs registers: where a
    norm of 16 warps has two terms, one block at a time has room on a multiprocessor, instead of two."""

    skips_joined_by_norms: bool = True
    """Have GroupNorm join a skip connection's channels to its input, and write their gradient as a map of its own.

    Else they are joined before; convolutions then lay out halves of the gradient anew. Of 646 launches and 19.7 GB of a
    training step at batch 128 of cifar10 that saves 16 and 0.4 GB."""
