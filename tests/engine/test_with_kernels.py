"""The whole engine with kernels and without: the same losses, weights and images, eager and compiled."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ddpm_fast import ops
from ddpm_fast.checks import kernels as check_kernels
from ddpm_fast.config import Config, DiffusionConfig, SamplerConfig, UNetConfig, with_training
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import can_compile_for_cpu
from ddpm_fast.engine.sampling import ImageRange, Loop, sample
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.presets import PRESETS

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (3, 4, 4)
UNET = UNetConfig(*SHAPE, 8, (1, 2), res_blocks=1, attention_resolutions=(2,), dropout=0.25, groups=4)
DIFFUSION = DiffusionConfig(timesteps=20, beta_end=0.4)


def configuration() -> Config:
    config = replace(PRESETS["cifar10"], unet=UNET, diffusion=DIFFUSION)
    return with_training(config, batch_size=2, warmup_steps=0, learning_rate=1e-3, precision="fp32")


def batch(first: int, n: int) -> tuple[Tensor, Tensor]:
    number = torch.arange(first, first + n, device=DEVICE)
    pixel = torch.arange(48, device=DEVICE).view(1, 4, 4, 3)
    images = ((number.view(-1, 1, 1, 1) * 37 + pixel * 5) % 256).to(torch.uint8)
    return images.permute(0, 3, 1, 2), number


def trainer(kernels: bool) -> Trainer:
    made = Trainer(configuration(), batch, DEVICE)
    made.unet.use_kernels(kernels)
    with torch.no_grad():  # not the near-zero start: every branch must matter
        generator = torch.Generator().manual_seed(0)
        for parameter in made.unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(DEVICE))
    return made


def test_training_takes_the_same_steps():
    """The bound: losses and gradient norms to 1e-5 of themselves, and weights to 2% of what Adam moved them by.

    Adam's first steps are the learning rate times the gradient's sign: where a gradient is all but zero, rounding
    decides; so the weights are compared in the mean.
    """
    ours, theirs = trainer(True), trainer(False)
    for _ in range(2):
        before = torch.cat([p.detach().flatten() for p in theirs.unet.parameters()])
        ours.train_step_no_sync()
        theirs.train_step_no_sync()
        torch.testing.assert_close(ours.gradient_norm, theirs.gradient_norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.read_loss(), theirs.read_loss(), rtol=1e-5, atol=0)
        mine, other = (torch.cat([p.detach().flatten() for p in t.unet.parameters()]) for t in (ours, theirs))
        assert (mine - other).abs().mean() < 0.02 * (other - before).abs().mean()


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 4), ("ddim", 2), ("dpm++", 3)])
def test_sampling_makes_the_same_images(sampler, steps):
    table = sampler_table(DIFFUSION, SamplerConfig(sampler, steps))
    ours, theirs = (
        sample(Loop(trainer(kernels).unet, table), ImageRange(3, 17, 2), largest_batch=2) for kernels in (True, False)
    )
    assert (ours - theirs).abs().max() < 1 / 255


def test_dropout_falls_on_the_same_activations():
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(DEVICE), torch.tensor([3, 7])
    address = NoiseAddress(key_from_seed(5, DEVICE), torch.arange(2, device=DEVICE))
    ours, theirs = (trainer(kernels).unet(x, t.to(DEVICE), address) for kernels in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, trainer(True).unet(x, t.to(DEVICE)), atol=1e-2)


@pytest.mark.parametrize("kernels", [True, False])
def test_compiles_whole_and_once(kernels):
    """One graph forward and backward, and none is compiled again from one step to the next."""
    made = trainer(kernels)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(made.unet, fullgraph=True, backend=counter)
    for step in range(2):
        images, sample_index = batch(2 * step, 2)
        x, t = images.float() / 127.5 - 1, torch.tensor([step, 2 * step], device=DEVICE)
        address = NoiseAddress(key_from_seed(step, DEVICE), sample_index)
        prediction = compiled(x, t, address)
        made.unet.zero_grad()
        prediction.square().mean().backward()
        gradients = [p.grad for p in made.unet.parameters() if p.grad is not None]
        plain = torch.autograd.grad(made.unet(x, t, address).square().mean(), list(made.unet.parameters()))
        torch.testing.assert_close(gradients, list(plain), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernels", [True, False])
def test_all_that_the_engine_compiles_is_one_graph(kernels):
    """The losses of a training step with their gradients, and the U-Net as the sampling loop calls it."""
    made = trainer(kernels)
    torch._dynamo.reset()
    losses, denoise = (
        torch.compile(function, fullgraph=True, backend="aot_eager")
        for function in (made._losses_of_batch, made.unet.denoise)
    )
    parameters = list(made.unet.parameters())
    found, plain = (
        torch.autograd.grad(function(*batch(4, 2)).sum(), parameters) for function in (losses, made._losses_of_batch)
    )
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        shifts = made.unet.time_shifts(torch.tensor([3.0], device=DEVICE)).expand(2, -1)
        torch.testing.assert_close(denoise(x, shifts), made.unet.denoise(x, shifts), rtol=1e-5, atol=1e-5)


def test_the_check_of_the_kernels_passes_and_finds_a_wrong_one(monkeypatch):
    config = configuration()
    lines = list(check_kernels.check_kernels(config, DEVICE, torch.float32))
    assert [line.name for line in lines if not line.passed] == []
    assert len(lines) == 5
    from ddpm_fast.kernels import group_norm_silu as module

    right = module.group_norm_silu

    def wrong_epsilon(*arguments, eps, **options):
        return right(*arguments, eps=1e-3, **options)

    monkeypatch.setattr(module, "group_norm_silu", wrong_epsilon)
    lines = list(check_kernels.check_kernels(config, DEVICE, torch.float32))
    assert [line.file for line in lines if not line.passed] == ["kernels/group_norm_silu.py"]


def test_the_table_of_the_kernels_names_every_norm_and_its_bound(monkeypatch):
    monkeypatch.setattr(check_kernels, "_times", lambda case, copy: "")  # they compile every reference: minutes
    rows = list(check_kernels.kernel_table(configuration(), DEVICE, torch.bfloat16))
    assert all(within_bound for _, within_bound in rows)
    norms = check_kernels.norms(UNET)
    assert len(rows) == 2 + 5 + 2 * len(norms)
    assert sum("group_norm_silu backward" in row for row, _ in rows) == len(norms)
    assert {norm.dropout for norm in norms if norm.shift} == {0.25}


def norm_backward() -> check_kernels.Case:
    norm = check_kernels.Norm(8, 4, 4, groups=4, silu=True, shift=False, dropout=0.0)
    return check_kernels._norm_case(norm, "backward", 2, DEVICE, torch.float32, seed=0)


@pytest.mark.skipif(not can_compile_for_cpu(), reason="PyTorch has nothing to compile for a CPU with")
def test_a_compiled_backward_pass_can_be_repeated_though_the_cache_has_one_that_cannot(monkeypatch):
    """A backward pass that is compiled to run once may reuse its tensors' memory, and lies in PyTorch's cache."""
    case, grad = norm_backward(), torch.autograd.grad
    own = {name: value.clone() for name, value in case.inputs.items()}
    compiled = torch.compile(partial(ops.group_norm_silu, kernels=False), dynamic=False, fullgraph=True)
    with monkeypatch.context() as once:
        once.setattr(torch.autograd, "grad", lambda *given, retain_graph=False, **named: grad(*given, **named))
        case.prepare(compiled, own)()
    run = check_kernels._bind(case, kernels=False, compiled=True)
    assert all(map(torch.equal, run(), run()))


@pytest.mark.gpu
def test_on_a_gpu_the_table_has_times():
    microseconds, _, _, eager, compiled = check_kernels._times(norm_backward(), 1000.0).split()
    assert all(float(number) > 0 for number in (microseconds, eager, compiled))
