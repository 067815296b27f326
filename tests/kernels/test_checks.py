"""kernels/checks.py: what every launcher refuses alike, by name, before anything is read or written."""

import pytest
import torch

triton = pytest.importorskip("triton")
from ddpm_fast.kernels import checks  # noqa: E402
from ddpm_fast.kernels.group_norm_silu import group_norm_silu  # noqa: E402
from ddpm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward  # noqa: E402
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_backward  # noqa: E402
from ddpm_fast.kernels.q_sample import q_sample  # noqa: E402
from ddpm_fast.kernels.reverse_step import reverse_step  # noqa: E402
from ddpm_fast.kernels.timestep_embedding import timestep_embedding  # noqa: E402


def image(device, channels=8):
    return torch.zeros(2, 4, 4, channels, device=device).permute(0, 3, 1, 2)


def address(device):
    return torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int64, device=device)


def lookups(device):
    return torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(9, 5, device=device), *address(device)


def norm(device):
    return torch.ones(8, device=device), torch.zeros(8, device=device), 2


def statistics(device):
    return torch.zeros(2, 2, device=device), torch.ones(2, 2, device=device)


def step(device):
    return torch.zeros(9, 8, device=device), torch.zeros(1, dtype=torch.int64, device=device), *address(device)


LAUNCHERS = {
    "images": lambda device: q_sample(image(device), *lookups(device)),
    "prediction": lambda device: noise_mse(image(device), image(device), *lookups(device)),
    "prediction, backward": lambda device: noise_mse_backward(
        torch.ones(2, device=device), image(device), image(device), *lookups(device)
    ),
    "x": lambda device: group_norm_silu(image(device), *norm(device)),
    "x, backward": lambda device: group_norm_silu_backward(
        image(device), image(device), *statistics(device), *norm(device)
    ),
    "x, in place": lambda device: reverse_step(image(device), image(device), *step(device), clip=True, noisy=True),
    "t": lambda device: timestep_embedding(torch.zeros(2, dtype=torch.int64, device=device), 8),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_cases_are_right_but_for_their_device(name, device):
    LAUNCHERS[name](device)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_cpu_is_refused_outside_the_interpreter(name, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=f"^{name.split(',')[0]} is on cpu: it takes a CUDA device"):
        LAUNCHERS[name]("cpu")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_device_without_memory_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name.split(',')[0]} is on meta"):
        LAUNCHERS[name]("meta")


def test_images_whose_offsets_would_overflow_are_refused(device):
    vast = torch.zeros(1, device=device).expand(2, 3, 2**15, 2**15)
    with pytest.raises(ValueError, match=r"x has shape .* in 1\.\.2\*\*31"):
        checks.image_shape("x", vast)
    assert checks.image_shape("x", vast[:, :1, :2]) == (2, 1, 2, 2**15)


def test_a_grid_too_large_is_refused(device):
    assert checks.grid("x", image(device), 2**31 - 1) == (2**31 - 1,)
    with pytest.raises(ValueError, match="x has shape"):
        checks.grid("x", image(device), 2**31)


def test_layouts_are_told_apart_and_mixtures_refused(device):
    nhwc = image(device)
    nchw = nhwc.contiguous()
    assert checks.is_nhwc(x=nhwc, x0=None)
    assert not checks.is_nhwc(x=nchw, out=nchw)
    for mixture in ({"x": nhwc, "out": nchw}, {"x": nchw[..., ::2], "out": nchw}):
        with pytest.raises(ValueError, match=r"x has strides .*, out has strides .*: it takes dense NHWC"):
            checks.is_nhwc(**mixture)
