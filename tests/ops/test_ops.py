"""The registered ops: sound for PyTorch's own checks, equal to the reference, and chosen as asked."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from ddpm_fast import ops
from ddpm_fast.config import DiffusionConfig
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.ops import reference

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def maps(*shape: int, last: bool = True) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)
    return value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def address(images: int) -> tuple[Tensor, Tensor]:
    return key_from_seed(2**40 + 3, DEVICE), 2**31 + torch.arange(images, device=DEVICE)


def training(channels: int, last: bool) -> tuple[Tensor, ...]:
    pixels = torch.arange(2 * channels * 16, device=DEVICE).to(torch.uint8).view(2, channels, 4, 4)
    layout = torch.channels_last if last else torch.contiguous_format
    t = torch.tensor([3, 500], device=DEVICE)
    table = training_table(DiffusionConfig(prediction="v")).to(DEVICE)
    return pixels.contiguous(memory_format=layout), t, table, *address(2)


def norm(shift: bool, scale_shift: bool, dropout: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()

    arguments: dict[str, Any] = {"x": maps(2, 8, 4, 4).requires_grad_(), "weight": leaf(8), "bias": leaf(8)}
    arguments |= {"shift": leaf(2, 8) if shift else None, "scale_shift": leaf(2, 16) if scale_shift else None}
    return arguments | {"dropout": ops.Dropout(0.3, *address(2), 2) if dropout else None, "groups": 4}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [False, True])
def test_registration_of_the_ops_on_images(channels: int, last: bool) -> None:
    arguments = training(channels, last)
    assert set(opcheck(ops._q_sample, (*arguments, True, torch.float32, last), test_utils=ALL).values()) == {"SUCCESS"}
    prediction = maps(2, channels, 4, 4, last=last).requires_grad_()
    opcheck(ops._noise_mse, (prediction, *arguments, True), test_utils=ALL)
    gradient = torch.ones(2, device=DEVICE)
    opcheck(ops._noise_mse_backward, (gradient, prediction.detach(), *arguments, True), test_utils=ALL)
    rows, step = sampler_table(DiffusionConfig()).rows.float().to(DEVICE), torch.tensor([5], device=DEVICE)
    x, out, x0, model_input = (maps(2, channels, 4, 4, last=last) for _ in range(4))
    options = {"clip": True, "noisy": True}
    for extra in ((None, None), (x0, model_input)):
        opcheck(ops._reverse_step, (x, out, rows, step, *address(2), *extra), options, test_utils=ALL)


def test_registration_of_timestep_embedding() -> None:
    opcheck(ops._timestep_embedding, (torch.tensor([3, 5], device=DEVICE), 8, torch.float32), test_utils=ALL)


@pytest.mark.parametrize(("shift", "scale_shift", "dropout"), [(False,) * 3, (True,) * 3, (True, False, True)])
def test_registration_of_group_norm_silu(shift: bool, scale_shift: bool, dropout: bool) -> None:
    given = norm(shift, scale_shift, dropout)
    inputs = [given[name] for name in ("x", "weight", "bias", "shift", "scale_shift")]
    probability, key, sample_index, layer = given["dropout"] or (0.0, None, None, 0)
    options = (4, True, probability, layer)
    opcheck(ops._group_norm_silu, (*inputs, key, sample_index, *options, 1e-6), test_utils=ALL)
    statistics = (torch.rand(2, 4, device=DEVICE) for _ in range(2))
    plain = [None if value is None else value.detach() for value in inputs]
    arguments = (maps(2, 8, 4, 4), *statistics, *plain, key, sample_index, *options)
    opcheck(ops._group_norm_silu_backward, arguments, test_utils=ALL)


@pytest.mark.parametrize(("shift", "scale_shift", "dropout"), [(False,) * 3, (True,) * 3])
def test_gradients_reach_every_input_of_group_norm_silu(shift: bool, scale_shift: bool, dropout: bool) -> None:
    given = norm(shift, scale_shift, dropout)
    leaves = [value for value in given.values() if isinstance(value, Tensor)]
    towards = maps(2, 8, 4, 4, last=False)  # a gradient may come back in any layout
    ours, theirs = (
        torch.autograd.grad(ops.group_norm_silu(**given, kernels=kernels), leaves, towards) for kernels in (True, False)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_mean_loss() -> None:
    """Its gradient by each image's loss is one number, expanded: not contiguous."""
    prediction = maps(2, 3, 4, 4).requires_grad_()
    pixels, t, table, key, sample_index = training(3, True)
    ours, theirs = (
        torch.autograd.grad(
            ops.noise_mse(prediction, pixels, t, table, key, sample_index, kernels=kernels).mean(), prediction
        )[0]
        for kernels in (True, False)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernels", [None, False])
def test_a_cpu_runs_plain_pytorch_by_default_and_no_kernels_everywhere(kernels, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a kernel was run")

    for name in ("q_sample", "noise_mse", "group_norm_silu", "timestep_embedding", "reverse_step"):
        monkeypatch.setattr(ops, f"_{name}", refuse)
    x = maps(2, 8, 4, 4).cpu()
    ops.group_norm_silu(x, torch.ones(8), torch.zeros(8), 4, kernels=kernels)
    ops.timestep_embedding(torch.tensor([1]), 8, kernels=kernels)
    pixels, t, table, key, sample_index = (value.cpu() for value in training(3, True))
    ops.q_sample(pixels, t, table, key, sample_index, kernels=kernels)
    ops.noise_mse(maps(2, 3, 4, 4).cpu(), pixels, t, table, key, sample_index, kernels=kernels)
    rows, step = sampler_table(DiffusionConfig()).rows.float(), torch.tensor([5])
    ops.reverse_step(x, x.clone(), rows, step, key, sample_index, clip=True, noisy=True, kernels=kernels)


def test_a_layout_that_the_kernel_cannot_take_is_named():
    x = maps(2, 8, 4, 4, last=False)
    with pytest.raises(ValueError, match="x has strides"):
        ops.group_norm_silu(x, torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE), 4, kernels=True)


def test_kernels_asked_for_on_a_cpu_without_the_interpreter_are_refused():
    code = "import torch; from ddpm_fast import ops; ops.timestep_embedding(torch.tensor([1]), 8, kernels=True)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "ValueError: t is on cpu" in done.stderr


def test_the_kernel_is_the_one_that_ran():
    """The two ways differ in the last bits of an angle: the kernel takes it in float64."""
    t = torch.arange(900, 1000, device=DEVICE)
    ours, theirs = (ops.timestep_embedding(t, 64, kernels=kernels) for kernels in (True, False))
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, reference.timestep_embedding(t, 64, torch.float64).float(), rtol=0, atol=2e-7)
