"""The whole engine with kernels and without: the same losses, weights and images, eager and compiled."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ddpm_fast.checks import kernels as check_kernels
from ddpm_fast.config import Config, DiffusionConfig, SamplerConfig, UNetConfig, with_training
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.sampling import ImageRange, SamplingLoop, sample
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.ops import REFERENCE, Ops, fused_ops
from ddpm_fast.presets import PRESETS

pytest.importorskip("triton")
FUSED = fused_ops()

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


def trainer(ops: Ops) -> Trainer:
    made = Trainer(configuration(), batch, DEVICE)
    made.unet.use(ops)
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
    ours, theirs = trainer(FUSED), trainer(REFERENCE)
    for _ in range(2):
        before = torch.cat([p.detach().flatten() for p in theirs.unet.parameters()])
        ours.train_step_no_sync()
        theirs.train_step_no_sync()
        torch.testing.assert_close(ours.figures, theirs.figures, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.read_loss(), theirs.read_loss(), rtol=1e-5, atol=0)
        mine, other = (torch.cat([p.detach().flatten() for p in t.unet.parameters()]) for t in (ours, theirs))
        assert (mine - other).abs().mean() < 0.02 * (other - before).abs().mean()


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        pytest.param("ddpm", 4, marks=pytest.mark.slow),
        pytest.param("ddim", 2, marks=pytest.mark.slow),
        ("dpm++", 3),
    ],
)
def test_sampling_makes_the_same_images(sampler, steps):
    table = sampler_table(DIFFUSION, SamplerConfig(sampler, steps))
    ours, theirs = (
        sample(SamplingLoop(trainer(ops).unet, table), ImageRange(3, 17, 2), largest_batch=2)
        for ops in (FUSED, REFERENCE)
    )
    assert (ours - theirs).abs().max() < 1 / 255


def test_dropout_falls_on_the_same_activations():
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(DEVICE), torch.tensor([3, 7])
    address = NoiseAddress(key_from_seed(5, DEVICE), torch.arange(2, device=DEVICE))
    ours, theirs = (trainer(ops).unet(x, t.to(DEVICE), address) for ops in (FUSED, REFERENCE))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, trainer(FUSED).unet(x, t.to(DEVICE)), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("ops", [FUSED, REFERENCE], ids=["kernels", "reference"])
def test_compiles_whole_and_once(ops):
    """One graph forward and backward, and none is compiled again from one step to the next."""
    made = trainer(ops)
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


@pytest.mark.slow
@pytest.mark.parametrize("ops", [FUSED, REFERENCE], ids=["kernels", "reference"])
def test_all_that_the_engine_compiles_is_one_graph(ops):
    """The losses of a training step with their gradients, and the U-Net as the sampling loop calls it."""
    made = trainer(ops)
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


@pytest.mark.slow
def test_the_check_of_the_kernels_passes_and_finds_a_wrong_one():
    config = configuration()
    lines = list(check_kernels.check_kernels(FUSED, config, DEVICE, torch.float32))
    assert [line.name for line in lines if not line.passed] == []
    assert len(lines) == 10
    wrong = replace(FUSED, group_norm_silu=partial(FUSED.group_norm_silu, eps=1e-3))
    lines = list(check_kernels.check_kernels(wrong, config, DEVICE, torch.float32))
    assert [line.file for line in lines if not line.passed] == [
        "kernels/group_norm_silu.py",
        "kernels/group_norm_silu_backward.py or kernels/group_norm_silu.py",
    ]


def test_every_norm_is_checked_in_both_directions():
    norms = check_kernels.norms(UNET)
    assert {norm.dropout for norm in norms if norm.shift} == {0.25}
    checked = [(case.norm, case.direction) for case in check_kernels.cases(configuration(), 2, DEVICE, torch.float32)]
    assert all((norm, direction) in checked for norm in norms for direction in ("forward", "backward"))


@pytest.mark.slow
def test_the_table_has_a_line_for_each_op_and_direction():
    head, *rows = check_kernels.kernel_table(FUSED, configuration(), DEVICE, torch.bfloat16)
    assert head[0].split() == ["kernel", "worst", "at", "error", "bound"]
    assert all(right for _, right in rows)
    names = {row.partition("  ")[0] for row, _ in rows}
    alone = {"q_sample", "timestep_embedding", "reverse_step", "adam_ema"}
    differentiated = "noise_mse", "group_norm_silu", "group_norm_silu_and_residual"
    both = {f"{op} {direction}" for op in differentiated for direction in ("forward", "backward")}
    assert names == alone | both
