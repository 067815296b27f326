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

from ddpm_fast.kernels import group_norm_tiles
from ddpm_fast.kernels.group_norm_silu import group_norm_silu
from ddpm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward
from ddpm_fast.kernels.group_norm_tiles import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "dx", "dweight", "dbias", "dshift")


class Case(NamedTuple):
    """One call: shapes, dtype and options."""

    shape: tuple[int, int, int, int] = (2, 32, 4, 4)
    groups: int = 8
    dtype: torch.dtype = torch.float32
    shift: bool = False
    silu: bool = True
    probability: float = 0.0
    other: bool = False
    mean: float = 0.5
    spread: float = 1.5


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor | None
    dy: Tensor
    dropout: Dropout | None
    other: Tensor | None


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
    indices = 2**31 + 7 * torch.arange(n, device=DEVICE)
    dropout = Dropout(case.probability, key_from_seed(2**45 + 3, DEVICE), indices, 5) if case.probability else None
    other = (3 * normal(n, h, w, c)).to(DEVICE, case.dtype).permute(0, 3, 1, 2) if case.other else None
    return Inputs(x, weight, bias, shift, dy, dropout, other)


def plain(case: Case, inputs: Inputs, dtype: torch.dtype | None) -> list[Tensor]:
    """Return y and the gradients by autograd through the reference, with inputs in `dtype`, or as they are.

    x has a second use, itself, towards which the gradient is `other`: autograd adds it.
    """
    given: dict[str, Any] = {"x": inputs.x, "weight": inputs.weight, "bias": inputs.bias, "shift": inputs.shift}
    leaves: dict[str, Any] = {
        name: value.detach().to(dtype or value.dtype).requires_grad_()
        for name, value in given.items()
        if value is not None
    }
    y = reference.group_norm_silu(**leaves, groups=case.groups, silu=case.silu, dropout=inputs.dropout)
    outputs, towards = [y], [inputs.dy.to(y.dtype)]
    if inputs.other is not None:
        outputs, towards = [y, leaves["x"]], [*towards, inputs.other.to(y.dtype)]
    return [y.detach(), *torch.autograd.grad(outputs, list(leaves.values()), towards)]


def options_of(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Return the options by which the kernels take a case."""
    dropout = {} if inputs.dropout is None else inputs.dropout._asdict()
    return {"groups": case.groups, "silu": case.silu, **dropout}


def kernel(case: Case, inputs: Inputs) -> list[Tensor]:
    """Return y and the gradients by the kernels."""
    options = options_of(case, inputs)
    y, mean, rstd = group_norm_silu(*inputs[:4], **options)
    return [y, *group_norm_silu_backward(inputs.dy, mean, rstd, *inputs[:4], other=inputs.other, **options)]


def sums_of_terms(case: Case, inputs: Inputs, truth: list[Tensor]) -> dict[str, float]:
    """Return, for each gradient that is a sum, at most how much its terms' magnitudes add up to.

    Each term carries a rounding of its own, however much they cancel: those of dshift, dx over the pixels, do so to
    zero where a group has one channel. SiLU's slope is below 1.1.
    """
    slope = 1.1 * inputs.dy.double().abs() / (1 - case.probability)
    x = inputs.x.double() + (0 if inputs.shift is None else inputs.shift.double()[:, :, None, None])
    normal = torch.nn.functional.group_norm(x, case.groups, eps=1e-6)
    dweight, dbias = ((slope * factor).abs().sum((0, 2, 3)).amax().item() for factor in (normal, 1))
    of_shift = truth[1] if inputs.other is None else truth[1] - inputs.other.double()
    return {"dweight": dweight, "dbias": dbias, "dshift": of_shift.abs().sum((2, 3)).amax().item()}


@pytest.fixture
def assert_close(assert_within: Callable[..., None]) -> Callable[..., None]:
    """Hold every output to the common rule."""

    def compare(case: Case) -> None:
        inputs = make(case)
        truth = plain(case, inputs, torch.float64)
        ours, usual = kernel(case, inputs), plain(case, inputs, None)
        terms, names = sums_of_terms(case, inputs, truth), NAMES[: len(truth)]  # dshift only of a shift
        for name, value, exact, theirs in zip(names, ours, truth, usual, strict=True):
            assert_within(value, theirs, exact, terms.get(name, 0.0) * torch.finfo(torch.float32).eps, name)

    return compare


FULL = Case(shift=True, probability=0.3, other=True)

CASES = {
    "plain": Case(),
    "no silu": Case(silu=False),
    "shift": Case(shift=True),
    "dropout": Case(probability=0.1),
    "a residual connection's gradient": Case(other=True),
    "everything": FULL,
    "one pixel": FULL._replace(shape=(2, 32, 1, 1)),
    "prime H and W": FULL._replace(shape=(1, 32, 3, 7)),
    "one image": FULL._replace(shape=(1, 32, 4, 4)),
    "three images": FULL._replace(shape=(3, 16, 2, 2)),
    "five images": FULL._replace(shape=(5, 8, 2, 3), groups=2),
    "129 images, one more than are summed at a time": FULL._replace(shape=(129, 4, 1, 2), groups=2, probability=0.0),
    "9 channels, one more than are summed by a program": FULL._replace(shape=(2, 9, 3, 3), groups=3),
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
@pytest.mark.parametrize(
    "name",
    ["plain", "a residual connection's gradient", "everything", "12 channels a group, a last block of its own size"],
)
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


@pytest.fixture(params=PLANS.values(), ids=list(PLANS))
def divide_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the work of 35 pixels in 8 groups of 4 by each of these plans, instead of the one for their size."""
    monkeypatch.setattr(group_norm_tiles, "plan", lambda *size: request.param)


@pytest.mark.usefixtures("divide_by")
@pytest.mark.parametrize("case", [FULL, Case(dtype=torch.bfloat16, other=True)], ids=["float32, all", "bfloat16"])
def test_every_division_of_the_work(case: Case, assert_close: Callable[..., None]) -> None:
    assert_close(case._replace(shape=(2, 32, 5, 7)))


@pytest.mark.parametrize(
    "slices", [Plan(4, 16, 32, 1, 32, 4), Plan(4, 16, 8, 1, 32, 4), Plan(4, 16, 8, 2, 16, 4)], ids=str
)
def test_divisions_into_whole_tiles(
    slices: Plan, monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]
) -> None:
    """32 pixels in one tile, in a loop, and split: nothing is masked, where of 35 pixels something always is."""
    monkeypatch.setattr(group_norm_tiles, "plan", lambda *size: slices)
    case = FULL._replace(shape=(2, 32, 4, 8))
    assert group_norm_tiles.divide(make(case).x, 8)[1]["WHOLE"]
    assert not group_norm_tiles.divide(make(case._replace(shape=(2, 32, 5, 7))).x, 8)[1]["WHOLE"]
    assert_close(case)


@pytest.mark.usefixtures("divide_by")
@pytest.mark.parametrize(("dtype", "mean", "spread"), [(torch.float32, 1000.0, 1e-2), (torch.bfloat16, 32.0, 1.0)])
def test_large_mean_small_variance(
    dtype: torch.dtype, mean: float, spread: float, assert_close: Callable[..., None]
) -> None:
    assert_close(Case((1, 32, 5, 7), dtype=dtype, mean=mean, spread=spread))


@pytest.mark.usefixtures("divide_by")
def test_statistics() -> None:
    inputs = make(Case((2, 32, 5, 7), mean=1000.0, spread=1e-2))
    group = inputs.x.double().unflatten(1, (8, 4)).flatten(2)
    _, mean, rstd = group_norm_silu(*inputs[:3], groups=8)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), group.mean(2), rtol=2**-23, atol=0)
    exact = (group.var(2, correction=0) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)


def test_a_first_tile_unlike_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics' pivot comes from the first tile, an eighth of the image: here it lies far from the mean."""
    monkeypatch.setattr(group_norm_tiles, "plan", lambda *size: Plan(8, 32, 8, 1, 64, 4))
    case = Case((1, 32, 8, 8), mean=0.0)
    inputs = make(case)
    inputs.x[:, :, 0] = 1e3 + 1e-3 * inputs.x[:, :, 0]
    truth, ours, usual = plain(case, inputs, torch.float64), kernel(case, inputs), plain(case, inputs, None)
    for name, value, exact, theirs in zip(NAMES[:4], ours, truth, usual, strict=True):
        bound = 2 * (theirs - exact).abs().max() + (1 + 8) * 2**-23 * exact.abs().max()
        assert (value - exact).abs().max() <= bound, name


@pytest.mark.usefixtures("divide_by")
@pytest.mark.parametrize("probability", [0.1, 0.75])
def test_drops_what_the_reference_drops(probability: float) -> None:
    case = Case((2, 32, 5, 7), silu=False, probability=probability)
    inputs, options = make(case), options_of(case, make(case))
    inputs.weight.zero_()
    inputs.bias.fill_(1)
    exact = reference.group_norm_silu(*inputs[:3], 8, silu=False, dropout=inputs.dropout)
    y, mean, rstd = group_norm_silu(*inputs[:3], **options)
    assert torch.equal(y == 0, exact == 0)
    dbias = group_norm_silu_backward(torch.ones_like(y), mean, rstd, *inputs[:3], **options)[2]
    torch.testing.assert_close(dbias, exact.sum((0, 2, 3)))


def test_no_dropout_at_probability_zero() -> None:
    inputs = make(FULL)
    assert inputs.dropout is not None
    options = options_of(FULL, inputs._replace(dropout=inputs.dropout._replace(probability=0.0)))
    assert torch.equal(group_norm_silu(*inputs[:3], **options)[0], group_norm_silu(*inputs[:3], groups=8)[0])


def test_any_shape(draw: Random, assert_close: Callable[..., None]) -> None:
    images, groups, size, height = (draw.randint(1, most) for most in (5, 4, 7, 6))
    width = draw.randint(1 if size * height > 1 else 2, 6)  # PyTorch refuses groups of one number
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    shift, silu = (draw.choice([False, True]) for _ in range(2))
    probability, other = draw.choice([0.0, 0.0, 0.4]), draw.choice([False, True])
    assert_close(Case((images, groups * size, height, width), groups, dtype, shift, silu, probability, other))


@pytest.mark.usefixtures("divide_by")
def test_two_runs_of_every_division_agree_bit_for_bit() -> None:
    case = FULL._replace(shape=(1, 32, 5, 7))
    assert all(map(torch.equal, kernel(case, make(case)), kernel(case, make(case))))


def test_no_images() -> None:
    shape = (0, 8, 2, 2)
    y, dx, *others = kernel(FULL, make(FULL._replace(shape=shape)))
    assert y.shape == dx.shape == shape
    assert len(others) == 3
    assert not any(gradient.any() for gradient in others)


def test_layouts_that_coincide() -> None:
    """With one pixel, or one channel, an NCHW tensor is an NHWC one."""
    weight, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    assert group_norm_silu(torch.randn(2, 8, 1, 1, device=DEVICE), weight, bias, groups=2)[0].isfinite().all()
    assert group_norm_silu(torch.randn(2, 1, 3, 3, device=DEVICE), weight[:1], bias[:1], groups=1)[0].isfinite().all()
