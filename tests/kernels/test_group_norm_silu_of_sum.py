"""`kernels/group_norm_silu` of a sum beside a skip connection, against the reference in float64.

Shapes: N image, C channel, H x W pixels, G group.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ddpm_fast.ops import reference

pytest.importorskip("triton")

from ddpm_fast.kernels import group_norm_tiles
from ddpm_fast.kernels.group_norm_silu import group_norm_silu_of_sum
from ddpm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward
from ddpm_fast.kernels.group_norm_tiles import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """One call."""

    channels: int = 32
    beside: int = 0
    groups: int = 8
    shift: bool = True
    added: bool = True
    size: tuple[int, int] = (4, 4)
    dtype: torch.dtype = torch.float32
    silu: bool = True


def make(case: Case, images: int = 2) -> dict[str, Any]:
    """Make inputs in the case's dtype, maps channels_last with means unlike each other; parameters float32."""
    generator = torch.Generator().manual_seed(case.channels + case.beside)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def images_of(channels: int, mean: float) -> Tensor:
        return (mean + 1.5 * normal(images, *case.size, channels)).to(DEVICE, case.dtype).permute(0, 3, 1, 2)

    all_channels = case.channels + case.beside
    inputs: dict[str, Any] = {"x": images_of(case.channels, 0.5)}
    inputs |= {"weight": (1 + 0.3 * normal(all_channels)).to(DEVICE), "bias": normal(all_channels).to(DEVICE)}
    if case.shift:
        inputs["shift"] = normal(1, case.channels).to(DEVICE).expand(images, -1)  # one bias for all images
    if case.added:
        inputs["added"] = images_of(case.channels, -2.0)
    if case.beside:
        inputs["beside"] = images_of(case.beside, 4.0)
    return inputs


def plain(case: Case, inputs: dict[str, Any], dtype: torch.dtype | None) -> list[Tensor]:
    """Return y, h and h's statistics by the reference, with inputs in `dtype`, or as they are."""
    inputs = {name: value.to(dtype or value.dtype) for name, value in inputs.items()}
    y, h = reference.group_norm_silu_and_residual(**inputs, groups=case.groups, silu=case.silu)
    group = h.to(torch.promote_types(h.dtype, torch.float32)).unflatten(1, (case.groups, -1)).flatten(2)
    return [y, h, group.mean(2), (group.var(2, correction=0) + 1e-6).rsqrt()]


@pytest.fixture
def assert_close(assert_within: Callable[..., None]) -> Callable[..., None]:
    """Hold every output to the common rule."""

    def compare(case: Case) -> None:
        inputs = make(case)
        truth, usual = plain(case, inputs, torch.float64), plain(case, inputs, None)
        ours = group_norm_silu_of_sum(**inputs, groups=case.groups, silu=case.silu)
        for name, value, exact, theirs in zip(("y", "h", "mean", "rstd"), ours, truth, usual, strict=True):
            assert_within(value, theirs, exact, 0.0, name)

    return compare


JOINED = Case(16, 8, groups=2)  # 12 channels a group: the second has four of x, and all of the skip connection
CASES = {
    "a bias": Case(added=False),
    "two maps": Case(shift=False),
    "two maps and a bias": Case(),
    "a skip connection": JOINED._replace(shift=False, added=False),
    "a skip connection and a bias": JOINED._replace(added=False),
    "everything": JOINED,
    "everything without SiLU": JOINED._replace(silu=False),
    "one pixel": JOINED._replace(size=(1, 1)),
    "prime H and W": JOINED._replace(size=(3, 7)),
    "one channel beside": Case(31, 1, groups=4),
    "one channel, and many beside": Case(1, 31, groups=4),
    "7 channels and 5, in one group": Case(7, 5, groups=1),
    "as many beside": Case(16, 16, groups=4),
    "256 channels and 128 in 32 groups, of which one has both": Case(256, 128, groups=32, size=(2, 2)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(case: Case, assert_close: Callable[..., None]) -> None:
    assert_close(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["a bias", "two maps", "a skip connection", "everything"])
def test_equals_reference_in_16_bits(name: str, dtype: torch.dtype, assert_close: Callable[..., None]) -> None:
    assert_close(CASES[name]._replace(dtype=dtype))


# 35 pixels: see `test_group_norm_silu`; 32 in whole tiles.
PLANS = {
    "one tile": (Plan(4, 16, 64, 1, 35, 4), (5, 7)),
    "loop": (Plan(4, 16, 8, 1, 40, 4), (5, 7)),
    "split": (Plan(4, 16, 8, 3, 16, 4), (5, 7)),
    "one whole tile": (Plan(4, 16, 32, 1, 32, 4), (4, 8)),
    "a loop over whole tiles": (Plan(4, 16, 8, 1, 32, 4), (4, 8)),
    "split into whole tiles": (Plan(4, 16, 8, 2, 16, 4), (4, 8)),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("case", [Case(22, 10), Case()], ids=["of a skip connection", "of one map"])
def test_every_division_of_the_work(
    name: str, case: Case, monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]
) -> None:
    """22 channels and 10 in 8 groups of 4: a group with channels of both lies in the middle of a block."""
    chosen, size = PLANS[name]
    monkeypatch.setattr(group_norm_tiles, "plan", lambda *size: chosen)
    assert_close(case._replace(size=size))


def test_the_sum_is_rounded_once() -> None:
    """In float16 what is normalised is the sum itself, not the rounded one that is handed on."""
    case = Case(shift=False, dtype=torch.float16)
    inputs = make(case)
    exact = reference.group_norm_silu_and_residual(**{n: v.double() for n, v in inputs.items()}, groups=8)[0]
    ours, theirs = (
        (op(**inputs, groups=8)[0].double() - exact).square().mean()
        for op in (group_norm_silu_of_sum, reference.group_norm_silu_and_residual)
    )
    assert ours < theirs


@pytest.mark.parametrize("name", PLANS)
def test_the_gradient_in_two_maps_is_that_of_both_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `test_group_norm_silu` holds to the reference: the same bits in other places, each of them dense."""
    chosen, size = PLANS[name]
    monkeypatch.setattr(group_norm_tiles, "plan", lambda *size: chosen)
    inputs = make(Case(22, 10, size=size))
    y, h, mean, rstd = group_norm_silu_of_sum(**inputs, groups=8)
    given = (y.sin(), mean, rstd, h, inputs["weight"], inputs["bias"])
    dh, *others = group_norm_silu_backward(*given, other=y.cos(), groups=8)
    dx, *same, dbeside = group_norm_silu_backward(*given, other=y.cos(), groups=8, beside=10)
    assert all(map(torch.equal, [torch.cat([dx, dbeside], dim=1), *same], [dh, *others]))
    assert dx.shape[1] == 22
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in (dx, dbeside))


def test_no_images() -> None:
    y, h, mean, rstd = group_norm_silu_of_sum(**make(JOINED, images=0), groups=2)
    assert y.shape == h.shape == (0, 24, 4, 4)
    assert mean.shape == rstd.shape == (0, 2)


def test_what_does_not_fit_is_named() -> None:
    inputs = make(JOINED)
    with pytest.raises(ValueError, match=r"^beside has shape \[2, 8, 4, 3\]: it takes \[2, 8, 4, 4\]"):
        group_norm_silu_of_sum(**inputs | {"beside": inputs["beside"][..., :3]}, groups=2)
    with pytest.raises(ValueError, match=r"^groups is 5: it takes a divisor of 24 channels"):
        group_norm_silu_of_sum(**inputs, groups=5)
    y, h, mean, rstd = group_norm_silu_of_sum(**inputs, groups=2)
    with pytest.raises(ValueError, match=r"^beside is 24: it takes fewer than 24 channels"):
        group_norm_silu_backward(y, mean, rstd, h, inputs["weight"], inputs["bias"], groups=2, beside=24)
