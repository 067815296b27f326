"""The U-Net's parts on their own, where its blocks do not show all of them: every timestep, and GroupNorm's edges.

Shapes: N images, C channels, H x W pixels, T timesteps, S the sum of all ResBlocks' output channels.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import textbook
from ddpm_fast.checks.followed import textbook_unet
from ddpm_fast.checks.recording import distance
from ddpm_fast.checks.results import CheckResult, Verdict, judged
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.model.blocks import FEWEST_PIXELS, Upsample

FLOAT32 = torch.finfo(torch.float32).eps
NORM_BOUND = 64 * FLOAT32
BLOCKS = "ddpm_fast/model/blocks.py"


class Norm(NamedTuple):
    """Inputs of a GroupNorm: x [N, C, H, W], weight and bias [C], shift [N, C]."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor


def _norms(trainer: Trainer) -> Iterator[tuple[str, Norm, int]]:
    """Yield GroupNorms that are hard in one way each: by name, inputs and groups."""
    generator = torch.Generator().manual_seed(2)
    for name, spread, images, channels, size in (
        ("ordinary values", 1.0, 2, 16, 4),
        ("values of 1e-3, which show what is added to the variance", 1e-3, 2, 16, 4),
        ("a batch so large that a CPU takes another way", 0.03, 64, 32, 12),
    ):
        x = spread * torch.randn(images, channels, size, size, generator=generator)
        weight, bias, *_ = 1 + 0.3 * torch.randn(2, channels, generator=generator)
        shift = spread * torch.randn(images, channels, generator=generator)
        x = x.to(trainer.device).contiguous(memory_format=torch.channels_last)
        yield name, Norm(x, *(value.to(trainer.device) for value in (weight, bias, shift))), 8


def check_group_norm(trainer: Trainer) -> Iterator[CheckResult]:
    """Compare the op of GroupNorm and SiLU, and its gradient, with PyTorch's in float64."""
    ops = trainer.unet.ops
    file = "ddpm_fast/ops/reference.py or ddpm_fast/ops/cpu_group_norm.py"
    file = "kernels/group_norm_silu.py" if ops.fused else file

    def engine(norm: Norm, groups: int) -> Tensor:
        return ops.group_norm_silu(norm.x, norm.weight, norm.bias, groups, shift=norm.shift)

    def book(norm: Norm, groups: int) -> Tensor:
        channels = len(norm.weight)
        config = replace(trainer.config.unet, channels=groups, groups=groups, head_channels=0)
        eps = textbook.ResBlock(channels, channels, config).norm1.eps
        return F.silu(F.group_norm(norm.x + norm.shift[:, :, None, None], groups, norm.weight, norm.bias, eps))

    for name, norm, groups in _norms(trainer):
        ours, theirs = (
            _with_gradients(engine, norm, groups),
            _with_gradients(book, Norm(*(v.double() for v in norm)), groups),
        )
        off = [distance(found, expected) for found, expected in zip(ours, theirs, strict=True)]
        expected = f"equal to float32's rounding, {NORM_BOUND:.0e}"
        if off[0] > NORM_BOUND:
            yield CheckResult(
                "network", f"GroupNorm and SiLU of {name}", Verdict.CHANGED, expected, f"{off[0]:.1e} off", file
            )
        elif max(off[1:]) > 8 * NORM_BOUND:
            gradient = Norm._fields[off[1:].index(max(off[1:]))]
            found, line = f"{max(off[1:]):.1e} off, for {gradient}", f"the gradient of GroupNorm and SiLU of {name}"
            yield CheckResult(
                "gradient", line, Verdict.WRONG, expected, found, file.replace("silu.py", "silu_backward.py")
            )
        else:
            yield CheckResult(
                "network", f"GroupNorm and SiLU of {name}", Verdict.RIGHT, expected, f"{off[0]:.0e}", file
            )


def _with_gradients(norm: Callable[[Norm, int], Tensor], inputs: Norm, groups: int) -> list[Tensor]:
    inputs = Norm(*(value.requires_grad_() for value in inputs))
    y = norm(inputs, groups)
    weights = torch.cos(torch.arange(y.numel(), device=y.device, dtype=torch.float64)).view_as(y).to(y.dtype)
    # Not as `grad_outputs`: to look at these PyTorch imports SymPy first, for half a second.
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), list(inputs))]


def check_upsampling(trainer: Trainer) -> CheckResult:
    """Compare upsampling of a batch so large that it takes another way, and its gradient, with PyTorch's in float64."""
    generator, channels, size = torch.Generator().manual_seed(3), 4, 16
    upsample = Upsample(channels, trainer.unet.forms.transposed_upsampling).to(trainer.device)
    for parameter in upsample.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2 * FEWEST_PIXELS // size**2, channels, size, size, generator=generator).to(trainer.device)
    given = [x.contiguous(memory_format=torch.channels_last).requires_grad_(), *upsample.parameters()]
    exact = [value.detach().double().requires_grad_() for value in given]
    y, book = upsample(given[0]), F.conv2d(F.interpolate(exact[0], scale_factor=2), *exact[1:], padding=1)
    weights = torch.cos(torch.arange(y.numel(), device=y.device, dtype=torch.float64)).view_as(y)
    (y * weights.to(y.dtype)).sum().backward()
    (book * weights).sum().backward()
    stage, verdict, name, off = "network", Verdict.CHANGED, "upsampling of a large batch", distance(y, book)
    bound = NORM_BOUND
    if off <= bound:
        stage, verdict, name, bound = "gradient", Verdict.WRONG, f"the gradient of {name}", 8 * NORM_BOUND
        pairs = [(torch.zeros_like(a) if a.grad is None else a.grad, b.grad) for a, b in zip(given, exact, strict=True)]
        off = max(distance(found, wanted) for found, wanted in pairs if wanted is not None)
    expected = f"equal to float32's rounding, {bound:.0e}"
    return CheckResult(stage, name, judged(off <= bound, verdict), expected, f"{off:.0e} off", BLOCKS)


class _Seen(Exception):  # noqa: N818
    """Ends a forward pass of which no more is needed."""


def _sinusoids(unet: nn.Module, t: Tensor, channels: int) -> Tensor:
    """Return what the textbook's time embedding is given at t: [T, channels]."""
    found: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0])
        raise _Seen

    handle = unet.get_submodule("time_embedding").register_forward_pre_hook(look)
    with suppress(_Seen):
        unet(torch.zeros(len(t), channels, 1, 1), t)
    handle.remove()
    return found[0]


@torch.no_grad()
def check_time_shifts(trainer: Trainer) -> Iterator[CheckResult]:
    """Compare what every ResBlock is told at every timestep of all T with the textbook's."""
    config = trainer.config
    try:
        unet = textbook_unet(config.unet, trainer.parameters)
    except RuntimeError:
        return  # another network: said where the blocks are compared
    t = torch.arange(config.diffusion.timesteps, device=trainer.device)
    embedding, labels = unet.time_embedding(_sinusoids(unet, t, config.unet.image_channels)), None
    if unet.class_embedding is not None:
        labels = t * 7 % (config.unet.classes + 1)  # each with t of its own, and none
        embedding = embedding + unet.class_embedding(labels)
    embedding = F.silu(embedding)
    blocks = [module for module in unet.modules() if isinstance(module, textbook.ResBlock)]
    expected = torch.cat([block.time_emb_proj(embedding) + block.conv1.bias for block in blocks], dim=1)  # [T, S]
    found = trainer.unet.time_shifts(t, labels)
    name = "the network is told every timestep as the textbook's is"
    rounding = 64 * FLOAT32 + FLOAT32 * len(t)  # of angles up to T
    off = (found - expected).norm(dim=1) / expected.norm(dim=1) if found.shape == expected.shape else torch.ones(1)
    worst = int(off.argmax())
    words = f"{float(off[worst]):.1e} off at t = {worst}"
    wanted, verdict = f"equal to rounding, {rounding:.0e}", judged(bool(off[worst] <= rounding), Verdict.CHANGED)
    file = "kernels/timestep_embedding.py" if trainer.unet.ops.fused else "ddpm_fast/ops/reference.py"
    yield CheckResult("network", name, verdict, wanted, words, f"ddpm_fast/model/unet.py or {file}")
