"""The registered ops: sound for PyTorch's own checks, equal to plain PyTorch, and chosen as asked."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.library import opcheck

from ddpm_fast import ops
from ddpm_fast.config import DiffusionConfig, UNetConfig
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.engine.execution import Execution, can_compile_for_cpu
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import REFERENCE, choose_ops, fused_ops, reference

pytest.importorskip("triton")
from ddpm_fast.ops import fused

ROOT = Path(__file__).parents[2]
FUSED = fused_ops()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def maps(*shape: int, last: bool = True) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)
    return value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def address(images: int) -> tuple[Tensor, Tensor]:
    return key_from_seed(2**40 + 3, DEVICE), 2**31 + torch.arange(images, device=DEVICE)


def training(channels: int) -> tuple[Tensor, ...]:
    pixels = torch.arange(2 * channels * 16, device=DEVICE).to(torch.uint8).view(2, channels, 4, 4)
    t = torch.tensor([3, 500], device=DEVICE)
    table = training_table(DiffusionConfig(prediction="v")).to(DEVICE)
    return pixels.contiguous(memory_format=torch.channels_last), t, table, *address(2)


def norm(shift: bool, dropout: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()

    arguments: dict[str, Any] = {"x": maps(2, 8, 4, 4).requires_grad_(), "weight": leaf(8), "bias": leaf(8)}
    arguments["shift"] = leaf(2, 8) if shift else None
    return arguments | {"dropout": reference.Dropout(0.3, *address(2), 2) if dropout else None, "groups": 4}


def sum_of(*terms: str) -> dict[str, Any]:
    """Return what group_norm_silu_and_residual adds up and joins: 8 channels, and 4 beside them if asked for."""
    generator, channels = torch.Generator().manual_seed(2), 12 if "beside" in terms else 8
    weight, bias, shift = (torch.randn(size, generator=generator) for size in (channels, channels, (2, 8)))
    more = {"shift": shift, "added": maps(2, 8, 4, 4).flip(0), "beside": maps(2, 4, 4, 4)}
    given = {"x": maps(2, 8, 4, 4), "weight": weight, "bias": bias} | {name: more[name] for name in terms}
    return {name: value.to(DEVICE).requires_grad_() for name, value in given.items()}


@pytest.mark.parametrize("channels", [1, 3])
def test_registration_of_the_ops_on_images(channels: int) -> None:
    arguments = training(channels)
    found = opcheck(fused.Q_SAMPLE, arguments, {"flip": True, "dtype": torch.bfloat16}, test_utils=ALL)
    assert set(found.values()) == {"SUCCESS"}
    prediction = maps(2, channels, 4, 4).requires_grad_()
    opcheck(fused.NOISE_MSE, (prediction, *arguments), {"flip": True}, test_utils=ALL)
    gradient = torch.ones(2, device=DEVICE)
    opcheck(fused.NOISE_MSE_BACKWARD, (gradient, prediction.detach(), *arguments), {"flip": True}, test_utils=ALL)
    rows, step = sampler_table(DiffusionConfig()).rows.float().to(DEVICE), torch.tensor([5], device=DEVICE)
    x, out, x0, model_input = (maps(2, channels, 4, 4) for _ in range(4))
    options = {"clip": True, "noisy": True}
    for extra in ((None, None), (x0, model_input)):
        opcheck(fused.REVERSE_STEP, (x, out, rows, step, *address(2), *extra), options, test_utils=ALL)


def test_registration_of_timestep_embedding() -> None:
    opcheck(fused.TIMESTEP_EMBEDDING, (torch.tensor([3, 5], device=DEVICE), 8, torch.float32), test_utils=ALL)


@pytest.mark.parametrize("low_precision", [None, torch.bfloat16])
def test_registration_of_adam_ema(low_precision: torch.dtype | None) -> None:
    state = [torch.rand(70, device=DEVICE) for _ in range(5)]  # weights, moments, average, gradient
    numbers, figures = torch.tensor([3, 2, -1, 1], device=DEVICE), torch.zeros(3, device=DEVICE)
    copied = None if low_precision is None else torch.zeros(70, dtype=low_precision, device=DEVICE)
    rates = {"learning_rate": 0.1, "warmup_steps": 5, "steps": 9, "cooldown_steps": 2}
    options = {**rates, "beta2": 0.99, "clip_norm": 1.0, "ema_decay": 0.99}
    arguments = (*state, torch.ones((), device=DEVICE), numbers, figures, copied)
    opcheck(fused.ADAM_EMA, arguments, options, test_utils=ALL)


@pytest.mark.parametrize(("shift", "dropout"), [(False, False), (True, True)])
def test_registration_of_group_norm_silu(shift: bool, dropout: bool) -> None:
    given = norm(shift, dropout)
    inputs = [given[name] for name in ("x", "weight", "bias", "shift")]
    probability, key, sample_index, layer = given["dropout"] or (0.0, None, None, 0)
    options = {"groups": 4, "probability": probability, "layer": layer}
    opcheck(fused.GROUP_NORM_SILU, (*inputs, key, sample_index), options, test_utils=ALL)
    statistics = (torch.rand(2, 4, device=DEVICE) for _ in range(2))
    plain = [None if value is None else value.detach() for value in inputs]
    arguments = (maps(2, 8, 4, 4), *statistics, *plain, key, sample_index)
    for other in (None, maps(2, 8, 4, 4)):
        opcheck(fused.GROUP_NORM_SILU_BACKWARD, (*arguments, other), options, test_utils=ALL)


@pytest.mark.parametrize("terms", [(), ("shift",), ("added",), ("beside",), ("shift", "added", "beside")], ids=str)
def test_registration_of_group_norm_silu_of_sum(terms: tuple[str, ...]) -> None:
    given = {name: value.detach() for name, value in sum_of(*terms).items()}
    found = opcheck(fused.GROUP_NORM_SILU_OF_SUM, (), {**given, "groups": 4}, test_utils=ALL)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("terms", [("shift",), ("added",), ("beside",), ("shift", "added", "beside")], ids=str)
def test_gradients_reach_every_term_of_a_sum(terms: tuple[str, ...]) -> None:
    given = sum_of(*terms)
    towards = [maps(2, len(given["weight"]), 4, 4, last=False), maps(2, len(given["weight"]), 4, 4).square()]

    def results(form: ops.Ops) -> list[Tensor]:
        found = form.group_norm_silu_and_residual(**given, groups=4)
        return [*found, *torch.autograd.grad(found, list(given.values()), towards)]

    for ours, theirs in zip(results(FUSED), results(REFERENCE), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("shift", "dropout"), [(False, False), (True, True)])
def test_gradients_reach_every_input_of_group_norm_silu(shift: bool, dropout: bool) -> None:
    given = norm(shift, dropout)
    leaves = [value for value in given.values() if isinstance(value, Tensor)]
    towards = maps(2, 8, 4, 4, last=False)  # a gradient may come back in any layout
    ours, theirs = (torch.autograd.grad(form.group_norm_silu(**given), leaves, towards) for form in (FUSED, REFERENCE))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("silu", [False, True])
def test_the_gradients_of_a_branch_and_past_it_are_added(silu: bool) -> None:
    """Past it they come in any layout: here as half the channels of a wider map, as they lie, or not at all."""
    given = {name: value for name, value in norm(False, False).items() if name not in ("shift", "dropout")}
    leaves = [value for value in given.values() if isinstance(value, Tensor)]
    wide = maps(2, 16, 4, 4)

    def gradients(form: ops.Ops, *towards: Tensor) -> tuple[Tensor, ...]:
        y, x = form.group_norm_silu_and_residual(**given, silu=silu)
        assert torch.equal(x, given["x"])
        return torch.autograd.grad((y, x)[: len(towards)], leaves, towards)

    for towards in ((wide[:, :8],), (wide[:, :8], wide[:, 8:]), (wide[:, :8], wide[:, 8:].contiguous())):
        for ours, theirs in zip(gradients(FUSED, *towards), gradients(REFERENCE, *towards), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_sum_past_a_branch_is_rounded_once() -> None:
    """In float16 the kernel adds before it rounds; autograd rounds both and their sum."""
    x, towards = maps(2, 8, 4, 4).half().requires_grad_(), maps(2, 8, 4, 4).half()
    exact = x.detach().double().requires_grad_()

    def gradient(form: ops.Ops, x: Tensor) -> Tensor:
        found = form.group_norm_silu_and_residual(x, torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE), 4)
        return torch.autograd.grad(found, x, [towards.to(x.dtype)] * 2)[0]

    truth = gradient(REFERENCE, exact)
    ours, theirs = ((gradient(form, x).double() - truth).abs().mean() for form in (FUSED, REFERENCE))
    assert ours < theirs


@pytest.mark.slow
@pytest.mark.skipif(not can_compile_for_cpu(), reason="needs a C++ compiler")
def test_what_is_compiled_around_a_branch_is_kept_for_the_next_process(monkeypatch, tmp_path):
    """PyTorch keeps no graph with an autograd function in it unless it is told to."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given = {name: value for name, value in norm(False, False).items() if name not in ("shift", "dropout")}
    torch._dynamo.reset()
    counters.clear()
    y, x = Execution(compiled=True).compile(FUSED.group_norm_silu_and_residual)(**given)
    (y * x).sum().backward()
    found = counters["aot_autograd"]
    assert (found["autograd_cache_saved"], found["autograd_cache_bypass"]) == (1, 0)


def test_gradient_of_the_mean_loss() -> None:
    """Its gradient by each image's loss is one number, expanded: not contiguous."""
    prediction, example = maps(2, 3, 4, 4).requires_grad_(), training(3)
    ours, theirs = (
        torch.autograd.grad(form.noise_mse(prediction, *example).mean(), prediction)[0] for form in (FUSED, REFERENCE)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_gpu_runs_kernels_unless_told_otherwise_and_a_cpu_plain_pytorch(monkeypatch):
    assert choose_ops(True, torch.device("cuda")) is FUSED
    assert choose_ops(False, torch.device("cuda")) is REFERENCE
    assert choose_ops(True, torch.device("cpu")) is REFERENCE
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    assert choose_ops(True, torch.device("cuda")) is REFERENCE


def test_a_unet_hands_its_ops_to_every_norm_and_to_its_copies():
    unet = UNet(UNetConfig(3, 4, 4, 8, (1, 2), 1, (2,), groups=4))
    assert unet.ops is REFERENCE
    for network in (unet.use(FUSED), copy.deepcopy(unet)):
        assert network.ops is FUSED
        assert {module.ops for module in network.modules() if hasattr(module, "ops")} == {FUSED}


@pytest.mark.slow
def test_a_unet_with_kernels_is_exported_with_gradients_and_dropout():
    unet = UNet(UNetConfig(3, 4, 4, 8, (1, 2), 1, (2,), dropout=0.25, groups=4)).use(FUSED).to(DEVICE)
    unet = unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    inputs = maps(2, 3, 4, 4), torch.tensor([3, 5], device=DEVICE), NoiseAddress(*address(2))
    exported = torch.export.export(unet, inputs)
    called = {str(node.target) for node in exported.graph.nodes if "ddpm_fast" in str(node.target)}
    named = ("group_norm_silu", "group_norm_silu_of_sum", "timestep_embedding")
    assert called == {f"ddpm_fast.{name}.default" for name in named}
    torch.testing.assert_close(exported.module()(*inputs), unet(*inputs))


def test_a_layout_that_the_kernel_cannot_take_is_named():
    x = maps(2, 8, 4, 4, last=False)
    with pytest.raises(ValueError, match="x has strides"):
        FUSED.group_norm_silu(x, torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE), 4)


def in_a_new_process(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_kernels_asked_for_on_a_cpu_without_the_interpreter_are_refused():
    done = in_a_new_process(
        "import torch; from ddpm_fast.ops import fused_ops; fused_ops().timestep_embedding(torch.tensor([1]), 8)"
    )
    assert "ValueError: t is on cpu" in done.stderr


def test_triton_is_imported_only_with_the_kernels():
    done = in_a_new_process("import sys, ddpm_fast.engine.sampling; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_the_kernel_is_the_one_that_ran():
    """The two forms differ in the last bits of an angle: the kernel takes it in float64."""
    t = torch.arange(900, 1000, device=DEVICE)
    ours, theirs = (form.timestep_embedding(t, 64) for form in (FUSED, REFERENCE))
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, reference.timestep_embedding(t, 64, torch.float64).float(), rtol=0, atol=2e-7)
