"""`kernels/group_norm_silu` against the reference in float64, forward and backward, on every way to divide the work.

Shapes: N image, C channel, H x W pixels, G group.
"""

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.ops import reference
from ddpm_fast.ops.reference import Dropout

pytest.importorskip("triton")

from ddpm_fast.kernels.group_norm_silu import group_norm_silu
from ddpm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward
from ddpm_fast.kernels.group_norm_tiles import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "dx", "dweight", "dbias", "dshift", "dscale_shift")


class Case(NamedTuple):
    """One call: shapes, dtype and options."""

    shape: tuple[int, int, int, int] = (2, 32, 4, 4)
    groups: int = 8
    dtype: torch.dtype = torch.float32
    shift: bool = False
    scale_shift: bool = False
    silu: bool = True
    probability: float = 0.0
    mean: float = 0.5
    spread: float = 1.5


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor | None
    scale_shift: Tensor | None
    dy: Tensor
    dropout: Dropout | None


def make(case: Case) -> Inputs:
    """Make inputs in the case's dtype, x and dy channels_last; parameters float32."""
    generator = torch.Generator().manual_seed(sum(case.shape) + case.groups)
    n, c, h, w = case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = (case.mean + case.spread * normal(n, h, w, c)).to(DEVICE, case.dtype).permute(0, 3, 1, 2)
    dy = normal(n, h, w, c).to(DEVICE, case.dtype).permute(0, 3, 1, 2)
    weight, bias = (1 + 0.3 * normal(c)).to(DEVICE), normal(c).to(DEVICE)
    rows = normal(n, c + 16).to(DEVICE, case.dtype)  # the shifts of all blocks side by side, as the U-Net has them
    shift = rows[:, 16:] if case.shift else None
    scale_shift = (0.5 * normal(n, 2 * c)).to(DEVICE, case.dtype) if case.scale_shift else None
    indices = 2**31 + 7 * torch.arange(n, device=DEVICE)
    dropout = Dropout(case.probability, key_from_seed(2**45 + 3, DEVICE), indices, 5) if case.probability else None
    return Inputs(x, weight, bias, shift, scale_shift, dy, dropout)


def plain(case: Case, inputs: Inputs, dtype: torch.dtype | None) -> list[Tensor | None]:
    """Return y and the gradients by autograd through the reference, with inputs in `dtype`, or as they are."""
    leaves = [None if v is None else v.detach().to(dtype or v.dtype).requires_grad_() for v in inputs[:5]]
    x, weight, bias, shift, scale_shift = leaves
    assert x is not None
    assert weight is not None
    assert bias is not None
    y = reference.group_norm_silu(
        x,
        weight,
        bias,
        case.groups,
        shift=shift,
        scale_shift=scale_shift,
        silu=case.silu,
        dropout=inputs.dropout,
    )
    y.backward(inputs.dy.to(y.dtype))
    return [y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def kernel(case: Case, inputs: Inputs, chosen: Plan | None = None) -> list[Tensor | None]:
    """Return y and the gradients by the kernels."""
    x, weight, bias, shift, scale_shift, dy, dropout = inputs
    options: dict[str, Any] = {
        "shift": shift,
        "scale_shift": scale_shift,
        "silu": case.silu,
        "dropout": dropout,
        "chosen": chosen,
    }
    y, mean, rstd = group_norm_silu(x, weight, bias, case.groups, **options)
    return [y, *group_norm_silu_backward(dy, x, mean, rstd, weight, bias, case.groups, **options)]


def sums_of_terms(case: Case, inputs: Inputs, truth: list[Tensor | None]) -> dict[str, float]:
    """Return, for each gradient that is a sum, at most how much its terms' magnitudes add up to.

    Each term carries a rounding of its own, however much they cancel: those of dshift, dx over the pixels, do so to
    zero where a group has one channel. SiLU's slope is below 1.1.
    """
    dx = truth[1]
    assert dx is not None
    slope = 1.1 * inputs.dy.double().abs() / (1 - case.probability)
    x = inputs.x.double() + (0 if inputs.shift is None else inputs.shift.double()[:, :, None, None])
    normal = torch.nn.functional.group_norm(x, case.groups, eps=1e-6)
    affine = normal * inputs.weight[:, None, None] + inputs.bias[:, None, None]
    scale = torch.zeros(()) if inputs.scale_shift is None else inputs.scale_shift.double()[:, : x.shape[1], None, None]
    scaled = slope * (1 + scale.to(slope).abs())
    whole, images = (
        {"dweight": scaled * normal, "dbias": scaled},
        {"dshift": dx, "dscale_shift": slope * (1 + affine.abs())},
    )
    return {k: v.abs().sum((0, 2, 3)).amax().item() for k, v in whole.items()} | {
        k: v.abs().sum((2, 3)).amax().item() for k, v in images.items()
    }


@pytest.fixture
def assert_close(assert_within: Callable[..., None]) -> Callable[..., None]:
    """Hold every output to the common rule."""

    def compare(case: Case, chosen: Plan | None = None) -> None:
        inputs = make(case)
        truth = plain(case, inputs, torch.float64)
        ours, usual = kernel(case, inputs, chosen), plain(case, inputs, None)
        terms = sums_of_terms(case, inputs, truth)
        for name, value, exact, theirs in zip(NAMES, ours, truth, usual, strict=True):  # None: not asked for
            assert (value is None) == (exact is None), name
            if value is None or exact is None or theirs is None:
                continue
            assert_within(value, theirs, exact, terms.get(name, 0.0) * torch.finfo(torch.float32).eps, name)

    return compare


FULL = Case(shift=True, scale_shift=True, probability=0.3)

CASES = {
    "plain": Case(),
    "no silu": Case(silu=False),
    "shift": Case(shift=True),
    "scale-shift": Case(scale_shift=True),
    "dropout": Case(probability=0.1),
    "everything": FULL,
    "one pixel": FULL._replace(shape=(2, 32, 1, 1)),
    "prime H and W": FULL._replace(shape=(1, 32, 3, 7)),
    "one image": FULL._replace(shape=(1, 32, 4, 4)),
    "three images": FULL._replace(shape=(3, 16, 2, 2)),
    "five images": FULL._replace(shape=(5, 8, 2, 3), groups=2),
    "33 images, one more than are summed at a time": FULL._replace(shape=(33, 4, 1, 2), groups=2, probability=0.0),
    "one channel": FULL._replace(shape=(2, 1, 3, 3), groups=1),
    "three channels, three to a group: no 16-byte rows": FULL._replace(shape=(2, 3, 5, 3), groups=1),
    "six channels, two quads of noise": FULL._replace(shape=(1, 6, 3, 3), groups=2),
    "77 channels, 7 to a group: rows unaligned to the end": FULL._replace(shape=(1, 77, 2, 3), groups=11),
    "one channel a group": FULL._replace(shape=(1, 32, 4, 4), groups=32),
    "one group": FULL._replace(shape=(1, 24, 4, 4), groups=1),
    "12 channels a group, a last block of its own size": FULL._replace(shape=(1, 36, 4, 4), groups=3),
    "96 channels, 3 a group": FULL._replace(shape=(1, 96, 3, 3), groups=32),
    "384 channels, 12 a group": Case((1, 384, 2, 2), 32, shift=True),
    "512 channels, 16 a group": Case((1, 512, 2, 2), 32),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(case: Case, assert_close: Callable[..., None]) -> None:
    assert_close(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "everything", "12 channels a group, a last block of its own size"])
def test_equals_reference_in_16_bits(name: str, dtype: torch.dtype, assert_close: Callable[..., None]) -> None:
    assert_close(CASES[name]._replace(dtype=dtype))


# 35 pixels: tiles of 8 leave a last one of 3; slices of 16 leave a last one of 3; 40 is one over a tile of 32.
PLANS = {
    "one tile": Plan(4, 16, 64, 1, 35, 4),
    "loop": Plan(4, 16, 8, 1, 40, 4),
    "loop, one over a tile": Plan(8, 32, 32, 1, 64, 4),
    "split": Plan(4, 16, 8, 3, 16, 4),
    "split, blocks that do not divide the groups": Plan(3, 16, 16, 3, 16, 4),
}


@pytest.mark.parametrize("chosen", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("case", [FULL, Case((2, 32, 5, 7), dtype=torch.bfloat16)], ids=["float32, all", "bfloat16"])
def test_every_division_of_the_work(case: Case, chosen: Plan, assert_close: Callable[..., None]) -> None:
    assert_close(case._replace(shape=(case.shape[0], 32, 5, 7)), chosen)


@pytest.mark.parametrize("chosen", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize(("dtype", "mean", "spread"), [(torch.float32, 1000.0, 1e-2), (torch.bfloat16, 32.0, 1.0)])
def test_large_mean_small_variance(
    chosen: Plan, dtype: torch.dtype, mean: float, spread: float, assert_close: Callable[..., None]
) -> None:
    assert_close(Case((1, 32, 5, 7), dtype=dtype, mean=mean, spread=spread), chosen)


def test_statistics() -> None:
    case = Case((2, 32, 5, 7), mean=1000.0, spread=1e-2)
    inputs = make(case)
    group = inputs.x.double().unflatten(1, (8, 4)).flatten(2)
    for chosen in PLANS.values():
        _, mean, rstd = group_norm_silu(inputs.x, inputs.weight, inputs.bias, 8, chosen=chosen)
        assert mean.dtype == rstd.dtype == torch.float32
        torch.testing.assert_close(mean.double(), group.mean(2), rtol=2**-23, atol=0)
        exact = (group.var(2, correction=0) + 1e-6).rsqrt()
        torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)


def test_a_first_tile_unlike_the_rest() -> None:
    """The statistics' pivot comes from the first tile, an eighth of the image: here it lies far from the mean."""
    case = Case((1, 32, 8, 8), mean=0.0)
    inputs = make(case)
    inputs.x[:, :, 0] = 1e3 + 1e-3 * inputs.x[:, :, 0]
    truth, ours = plain(case, inputs, torch.float64), kernel(case, inputs, Plan(8, 32, 8, 1, 64, 4))
    usual = plain(case, inputs, None)
    for name, value, exact, theirs in zip(NAMES[:4], ours, truth, usual, strict=False):
        assert value is not None
        assert exact is not None
        assert theirs is not None
        bound = 2 * (theirs - exact).abs().max() + (1 + 8) * 2**-23 * exact.abs().max()
        assert (value - exact).abs().max() <= bound, name


@pytest.mark.parametrize("chosen", [None, PLANS["split"]], ids=["one tile", "split"])
@pytest.mark.parametrize("probability", [0.1, 0.75])
def test_drops_what_the_reference_drops(probability: float, chosen: Plan | None) -> None:
    inputs = make(Case((2, 32, 5, 7), silu=False, probability=probability))
    inputs.weight.zero_()
    inputs.bias.fill_(1)
    arguments = (inputs.x, inputs.weight, inputs.bias, 8)
    exact = reference.group_norm_silu(*arguments, silu=False, dropout=inputs.dropout)
    y, mean, rstd = group_norm_silu(*arguments, silu=False, dropout=inputs.dropout, chosen=chosen)
    assert torch.equal(y == 0, exact == 0)
    dbias = group_norm_silu_backward(
        torch.ones_like(y), inputs.x, mean, rstd, *arguments[1:], silu=False, dropout=inputs.dropout, chosen=chosen
    )[2]
    torch.testing.assert_close(dbias, exact.sum((0, 2, 3)))


def test_no_dropout_at_probability_zero() -> None:
    inputs = make(FULL)
    assert inputs.dropout is not None
    without = group_norm_silu(*inputs[:3], 8)[0]
    assert torch.equal(group_norm_silu(*inputs[:3], 8, dropout=inputs.dropout._replace(probability=0.0))[0], without)


def test_any_shape(draw: Random, assert_close: Callable[..., None]) -> None:
    images, groups, size, height = (draw.randint(1, most) for most in (5, 4, 7, 6))
    width = draw.randint(1 if size * height > 1 else 2, 6)  # PyTorch refuses groups of one number
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    shift, scale_shift, silu = (draw.choice([False, True]) for _ in range(3))
    probability = draw.choice([0.0, 0.0, 0.4])
    assert_close(Case((images, groups * size, height, width), groups, dtype, shift, scale_shift, silu, probability))


def test_two_runs_of_a_split_agree_bit_for_bit() -> None:
    case, chosen = FULL._replace(shape=(1, 32, 5, 7)), PLANS["split"]
    first, second = (kernel(case, make(case), chosen) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)


def test_no_images() -> None:
    shape = (0, 8, 2, 2)
    y, dx, dweight, dbias, dshift, dscale_shift = kernel(FULL, make(FULL._replace(shape=shape)))
    assert y is not None
    assert dx is not None
    assert y.shape == dx.shape == shape
    assert not any(g.any() for g in (dweight, dbias, dshift, dscale_shift) if g is not None)


def test_layouts_that_coincide() -> None:
    """With one pixel, or one channel, an NCHW tensor is an NHWC one."""
    weight, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    assert group_norm_silu(torch.randn(2, 8, 1, 1, device=DEVICE), weight, bias, 2)[0].isfinite().all()
    assert group_norm_silu(torch.randn(2, 1, 3, 3, device=DEVICE), weight[:1], bias[:1], 1)[0].isfinite().all()
