"""What all launchers do alike: refuse by name what they cannot take, and give the same bits twice.

Every tensor of every launcher is made wrong in each way, one at a time; what a single launcher refuses besides (an odd
dim, groups that do not divide) is tested beside it. Shapes: N images, C channels, H x W pixels, G groups.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
from ddpm_fast.kernels.group_norm_silu import group_norm_silu  # noqa: E402
from ddpm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward  # noqa: E402
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_backward  # noqa: E402
from ddpm_fast.kernels.q_sample import q_sample  # noqa: E402
from ddpm_fast.kernels.reverse_step import reverse_step  # noqa: E402
from ddpm_fast.kernels.timestep_embedding import timestep_embedding  # noqa: E402

N, C, H, W, G = 2, 8, 5, 7, 2

LAUNCHERS: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
    "q_sample": (q_sample, ("images", "t", "table", "key", "sample_index"), {"flip": True}),
    "noise_mse": (noise_mse, ("prediction", "images", "t", "table", "key", "sample_index"), {"flip": True}),
    "noise_mse_backward": (
        noise_mse_backward,
        ("prediction", "grad", "images", "t", "table", "key", "sample_index"),
        {"flip": True},
    ),
    "group_norm_silu": (group_norm_silu, ("x", "weight", "bias", "shift", "scale_shift"), {"groups": G}),
    "group_norm_silu_backward": (
        group_norm_silu_backward,
        ("x", "dy", "mean", "rstd", "weight", "bias", "shift", "scale_shift"),
        {"groups": G},
    ),
    "reverse_step": (
        reverse_step,
        ("x", "out", "rows", "step", "key", "sample_index", "x0", "model_input"),
        {"clip": True, "noisy": True},
    ),
    "timestep_embedding": (timestep_embedding, ("t",), {"dim": 8}),
}
SIZES = {
    "table": (9, 5), "rows": (9, 8), "grad": (N,), "weight": (C,), "bias": (C,), "shift": (N, C),
    "scale_shift": (N, 2 * C), "mean": (N, G), "rstd": (N, G),
}  # fmt: skip
WORDS = {"t": (N,), "sample_index": (N,), "key": (2,), "step": (1,)}
EVERY_TENSOR = [(launcher, name) for launcher, (_, names, _) in LAUNCHERS.items() for name in names]


def make(name: str, device: str) -> Tensor:
    """Return a tensor that the launchers take: images as NHWC, rows and words as numbers below 9."""
    generator = torch.Generator().manual_seed(len(name))
    if name in WORDS:
        return torch.randint(0, 9, WORDS[name], generator=generator).to(device)
    if name in SIZES:
        return torch.rand(SIZES[name], generator=generator).to(device)
    return torch.rand(N, H, W, C, generator=generator).to(device).permute(0, 3, 1, 2)


def launch(launcher: str, device: str, **instead: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Return what a launcher returns, and its tensors, of which it may have written some."""
    op, names, options = LAUNCHERS[launcher]
    tensors = {name: make(name, device) for name in names} | instead
    return op(**tensors, **options), tensors


def outputs(launcher: str, device: str) -> list[Tensor]:
    returned, tensors = launch(launcher, device)
    values = returned if isinstance(returned, tuple) else (returned,)
    written = [tensors[name] for name in ("x", "x0", "model_input") if launcher == "reverse_step"]
    return [value for value in (*values, *written) if value is not None]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_runs_agree_bit_for_bit_and_leave_nothing_out(launcher, device):
    first, second = outputs(launcher, device), outputs(launcher, device)
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # NaN, with which all begin, is unequal


@pytest.mark.parametrize(("launcher", "name"), EVERY_TENSOR)
def test_a_wrong_shape_is_refused(launcher, name, device):
    wrong = make(name, device)[..., :-1].clone(memory_format=torch.preserve_format)
    if name in ("images", "x", "prediction") and name == LAUNCHERS[launcher][1][0]:
        wrong = make(name, device)[0]  # whatever shape the first has is what the others must have
    elif launcher == "timestep_embedding":
        wrong = make(name, device)[None]
    with pytest.raises(ValueError, match=f"^{name} has shape .*: it takes"):
        launch(launcher, device, **{name: wrong})


@pytest.mark.parametrize(("launcher", "name"), EVERY_TENSOR)
def test_a_wrong_dtype_is_refused(launcher, name, device):
    with pytest.raises(ValueError, match=f"^{name} is torch.complex64: it takes"):
        launch(launcher, device, **{name: make(name, device).to(torch.complex64)})


@pytest.mark.parametrize(("launcher", "name"), EVERY_TENSOR)
def test_a_wrong_device_is_refused(launcher, name, device):
    with pytest.raises(ValueError, match=f"^{name} is on meta: it takes"):
        launch(launcher, device, **{name: make(name, device).to("meta")})


@pytest.mark.parametrize(("launcher", "name"), [pair for pair in EVERY_TENSOR if pair[1] != "step"])
def test_gaps_in_memory_are_refused(launcher, name, device):
    """Of the last dimension every second element, among NaN; a single one, as step is, has no gaps."""
    whole = make(name, device)
    gaps = torch.full((*whole.shape, 2), 113, dtype=whole.dtype, device=device)[..., 0].copy_(whole)
    with pytest.raises(ValueError, match=rf"^(x has strides .*, )?{name} has strides .*: it takes"):
        launch(launcher, device, **{name: gaps})


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cpu_is_refused_outside_the_interpreter(launcher, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    first = LAUNCHERS[launcher][1][0]
    with pytest.raises(ValueError, match=f"^{first} is on cpu: it takes a CUDA device"):
        launch(launcher, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_dtype_that_a_message_names_is_taken(launcher, dtype, device):
    """Where one tensor may have it, all that may have it do, but for those of float32 alone."""
    alone = {"table", "rows", "grad", "mean", "rstd", *(("x", "x0") if launcher == "reverse_step" else ())}
    names = [name for name in LAUNCHERS[launcher][1] if name not in WORDS and name not in alone]
    launch(launcher, device, **{name: make(name, device).to(dtype) for name in names})
