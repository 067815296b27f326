"""kernels/group_norm_tiles.py: how the work is divided, and what both passes refuse.

Shapes: N image, C channel, H x W pixels, G group.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ddpm_fast.kernels.group_norm_silu import group_norm_silu
from ddpm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward
from ddpm_fast.kernels.group_norm_tiles import divide, plan


@pytest.mark.parametrize(("pixels", "inputs"), [(4096, 1), (256, 2)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels", [3, 32, 96, 128, 384, 512, 1024])
def test_plan_covers_everything_in_aligned_rows(channels: int, itemsize: int, pixels: int, inputs: int) -> None:
    groups = 3 if channels == 3 else 32
    for chosen in (plan(n, channels, groups, itemsize, inputs) for n in (1, 31, pixels, 65536, 65537)):
        width = chosen.groups * (channels // groups)
        assert channels == 3 or width * itemsize % 16 == 0
        assert width <= chosen.block_channels
        assert chosen.groups <= groups


def test_plan_takes_each_path() -> None:
    """CIFAR's largest maps stay in registers, or in L2 with 24 channels of 32 lanes; a 256 x 256 image is split."""
    assert plan(1024, 128, 32, 2).one_tile
    assert plan(1024, 384, 32, 2).slices == 1
    assert not plan(1024, 384, 32, 2).one_tile
    assert plan(65536, 128, 32, 2).slices == 64


@pytest.mark.parametrize("channels", [128, 256, 512])
def test_several_blocks_share_a_multiprocessor(channels: int) -> None:
    """Where they can be compiled for few enough registers; that nothing spills then, the compile tests show."""

    def options(size: int, **options: Any) -> dict[str, Any]:
        x = torch.empty(1, channels, size, size, dtype=torch.bfloat16, device="meta")
        return divide(x, 32, **options)[1]

    largest = options(32)
    assert (largest["num_warps"], largest["maxnreg"], largest["WHOLE"]) == (16, 64, True)
    assert options(32, more=True)["maxnreg"] is None
    assert options(28)["maxnreg"] is None  # masked: 784 pixels in a tile of 1,024
    assert [options(16, inputs=2)[name] for name in ("num_warps", "maxnreg")] == [8, 80]
    assert options(16, inputs=2, shift=True)["maxnreg"] is None


@pytest.mark.parametrize("size", [7, 14, 28, 64])
def test_a_thread_that_joins_and_adds_float32_holds_half_as_much(size: int) -> None:
    """What spilled was 48 channels of 14 x 14 in 8 groups; a block still fits into a multiprocessor's registers."""

    def options(dtype: torch.dtype, more: bool) -> dict[str, Any]:
        return divide(torch.empty(1, 48, size, size, dtype=dtype, device="meta"), 8, more=more, joined=True)[1]

    for dtype in (torch.float32, torch.bfloat16):
        joined, added = options(dtype, more=False), options(dtype, more=True)
        one_tile = added["BLOCK_P"] >= size * size
        twice = dtype == torch.float32 and one_tile and joined["num_warps"] < 16
        assert added.pop("num_warps") == joined.pop("num_warps") * (2 if twice else 1)
        assert added == joined
    assert joined["maxnreg"] * 32 * 16 <= 65536


@pytest.mark.parametrize(("channels", "groups"), [(384, 32), (36, 3)])
def test_lanes_without_a_channel_are_masked(channels: int, groups: int) -> None:
    """12 channels a group in 16 or 32 lanes, also where a block's lanes divide the channels."""
    x = torch.empty(1, channels, 4, 4, device="meta")
    chosen, sizes = divide(x, groups)
    assert chosen.block_channels > chosen.groups * 12 or channels % (chosen.groups * 12)
    assert not sizes["WHOLE"]


def good(device: str) -> dict[str, Any]:
    """Return arguments that the kernel takes."""
    x = torch.zeros(2, 4, 4, 32, device=device).permute(0, 3, 1, 2)
    return {"x": x, "weight": torch.ones(32, device=device), "bias": torch.zeros(32, device=device), "groups": 8}


def on(device: str, value: Any) -> Any:
    """Move the tensors in a value, which are to be wrong in one way only, to the device."""
    if isinstance(value, Tensor):
        return value.to(device) if value.device.type == "cpu" else value
    return tuple(on(device, one) for one in value) if isinstance(value, tuple) else value


BAD: dict[str, dict[str, Any]] = {
    "x has shape": {"x": torch.zeros(2, 32, 4)},
    "x has shape .*in 1..": {"x": torch.zeros(2, 32, 0, 4)},
    "x has strides": {"x": torch.zeros(2, 32, 4, 4)},
    "x is torch.float64": {"x": torch.zeros(2, 4, 4, 32, dtype=torch.float64).permute(0, 3, 1, 2)},
    "groups is 5": {"groups": 5},
    "groups is 0": {"groups": 0},
    "groups is 1": {
        "x": torch.zeros(1, 32768, 1, 1),
        "weight": torch.ones(32768),
        "bias": torch.ones(32768),
        "groups": 1,
    },
    "weight has shape": {"weight": torch.zeros(31)},
    "weight is on meta": {"weight": torch.zeros(32, device="meta")},
    "bias is torch.int64": {"bias": torch.zeros(32, dtype=torch.int64)},
    "bias has strides": {"bias": torch.zeros(64)[::2]},
    "shift has shape": {"shift": torch.zeros(2, 64)},
    "shift has strides": {"shift": torch.zeros(32, 2).T},
    "dropout's probability": {"probability": 1.0},
    "key is torch.int32": {"key": torch.zeros(2).int(), "sample_index": torch.zeros(2).long()},
    "sample_index has shape": {"key": torch.zeros(2).long(), "sample_index": torch.zeros(3).long()},
}


@pytest.mark.parametrize("message", BAD)
def test_refuses(message: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**good(device) | {name: on(device, value) for name, value in BAD[message].items()})


@pytest.mark.parametrize("wrong", ["dy", "mean", "rstd", "other"])
def test_backward_refuses(wrong: str, device: str) -> None:
    arguments, statistics = good(device), torch.zeros(2, 8, device=device)
    arguments |= {"dy": arguments["x"], "mean": statistics, "rstd": statistics, wrong: statistics[:1]}
    with pytest.raises(ValueError, match=f"{wrong} has shape"):
        group_norm_silu_backward(**arguments)


@pytest.mark.parametrize("wrong", ["dy", "other"])
def test_backward_refuses_a_gradient_in_another_layout(wrong: str, device: str) -> None:
    arguments, statistics = good(device), torch.zeros(2, 8, device=device)
    arguments |= {"dy": arguments["x"], wrong: arguments["x"].contiguous()}
    with pytest.raises(ValueError, match=f"{wrong} has strides"):
        group_norm_silu_backward(mean=statistics, rstd=statistics, **arguments)
