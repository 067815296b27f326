"""How the presets launch group_norm_silu (see `compile_all`): every GroupNorm that their U-Nets call.

Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from compile_all import CONFIGS, Launch, Specialisation, record, specialise
from torch import Tensor

from ddpm_fast.checks.norms import Norm, norms
from ddpm_fast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_of_sum
from ddpm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward


def words(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def launches(norm: Norm, images: int, dtype: torch.dtype, training: bool) -> Iterator[Launch]:
    """Yield what one call launches: in training forward and backward, in sampling forward without dropout."""
    C, H, W = norm.channels, norm.height, norm.width

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def images_of(channels: int) -> Tensor:
        return empty(images, H, W, channels, dtype=dtype).permute(0, 3, 1, 2)

    x, h = images_of(C - norm.beside), images_of(C)
    # A block's shifts are a slice of those of all blocks, a row an image in training, one row for all in sampling.
    shifts = empty(images if training else 1, 2 * C, dtype=dtype)[:, C : 2 * C - norm.beside].expand(images, -1)
    shift = shifts if norm.shift else None
    options: dict[str, Any] = {"groups": norm.groups, "silu": norm.silu}
    if training and norm.dropout:
        options |= {"key": words(2), "sample_index": words(images), "probability": norm.dropout, "layer": 1}
    inputs = empty(C), empty(C), shift
    if norm.residual and (norm.shift or norm.added or norm.beside):
        terms = x if norm.added else None, images_of(norm.beside) if norm.beside else None
        yield from record(group_norm_silu_of_sum, x, *inputs, *terms, **options)
    else:
        yield from record(group_norm_silu, x, *inputs, **options)
    if training:
        statistics = empty(images, norm.groups), empty(images, norm.groups)
        other = {"other": h, "beside": norm.beside} if norm.residual else {}
        yield from record(group_norm_silu_backward, h, *statistics, h, *inputs, **options, **other)


PASSES = {"statistics_kernel": 2, "sums_kernel": 2}
"""Reads of a tile in the code of kernels that only loop: the first tile, and the loop over the others."""


def expected(launch: Launch) -> tuple[int, int]:
    """Return the bytes that a thread loads and stores of x, y and their gradients, if 16 divide its share of a row."""
    given, name = launch.arguments, launch.kernel.fn.__name__
    if name == "parameter_gradient_kernel":
        return 0, 0
    row = given["BLOCK_GROUPS"] * given["C"] // given["G"] * given["x"].element_size()
    share = given["BLOCK_P"] * given["BLOCK_C"] // (32 * given["num_warps"]) * given["x"].element_size()
    if row % 16 or share % 16:
        return 0, 0
    # One read where a tile is all, or all that is left to do; else the first tile, and two loops.
    passes = PASSES.get(name) or (1 if given["ONE"] or given["SLICES"] > 1 else 3)
    read = [tensor for tensor in ("x", "added", "beside", "dy") if given.get(tensor) is not None]
    once = given.get("other") is not None  # what is added to dx
    written = 0 if name in PASSES else 1 + (given.get("h") is not None)
    return share * (passes * len(read) + once), share * written


def describe(norm: Norm, dtype: torch.dtype, training: bool) -> str:
    options = [
        *(["shift"] if norm.shift else []),
        *(["dropout"] if norm.dropout and training else []),
        *([] if norm.silu else ["no SiLU"]),
        *(["residual"] if norm.residual and training else []),
        *(["sum"] if norm.added else []),
        *([f"{norm.beside} beside"] if norm.beside else []),
    ]
    kind = str(dtype).removeprefix("torch.")
    return f"{norm.channels}x{norm.height}x{norm.width} {kind} {' '.join(options)}".rstrip()


def specialisations() -> Iterator[Specialisation]:
    for config in {config.unet: config for config in CONFIGS}.values():
        batch = config.training.batch_size // config.training.accumulate
        for dtype, training in product((torch.float32, torch.bfloat16), (True, False)):
            for norm in norms(config.unet, sampling=not training):
                for launch in launches(norm, batch, dtype, training):
                    yield specialise(launch, describe(norm, dtype, training), *expected(launch))
