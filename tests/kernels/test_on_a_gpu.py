"""The registered ops on a GPU: their launches do not wait for it, and can be captured.

The launchers alone, each of their tensors in turn: test_every_launcher.py; compute-sanitizer: test_sanitizer.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_fast.config import DiffusionConfig
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.ops import fused_ops
from ddpm_fast.ops.reference import Dropout

pytest.importorskip("triton")
from ddpm_fast.ops.fused import NOISE_MSE_BACKWARD

FUSED = fused_ops()
pytestmark = pytest.mark.gpu
OPS = (
    "q_sample",
    "noise_mse",
    "noise_mse_backward",
    "group_norm_silu",
    "timestep_embedding",
    "reverse_step",
    "adam_ema",
)


class Call:
    """One op on fixed tensors, of which `changing` may be written between two runs."""

    def __init__(self, op: str) -> None:
        self.key = key_from_seed(3, "cuda")
        self.index = torch.arange(4, device="cuda")
        self.t = torch.tensor([0, 10, 500, 999], device="cuda")
        self.step = torch.tensor([3], device="cuda")
        self.x = torch.randn(4, 32, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
        self.images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
        self.table = training_table(DiffusionConfig()).cuda()
        self.rows = sampler_table(DiffusionConfig()).rows.float().cuda()
        self.run: Callable[[], Tensor] = getattr(self, op)
        self.numbers = torch.tensor([3, 2, -1, 1], device="cuda")
        self.changing = {"timestep_embedding": self.t, "reverse_step": self.step, "adam_ema": self.numbers[:2]}.get(
            op, self.key
        )

    def address(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.t, self.table, self.key, self.index

    def three(self, first: int) -> Tensor:
        return self.x[:, first : first + 3].contiguous(memory_format=torch.channels_last)

    def q_sample(self) -> Tensor:
        return FUSED.q_sample(self.images, *self.address(), flip=True, dtype=torch.bfloat16)

    def noise_mse(self) -> Tensor:
        return FUSED.noise_mse(self.three(0), self.images, *self.address())

    def noise_mse_backward(self) -> Tensor:
        return NOISE_MSE_BACKWARD(torch.ones(4, device="cuda"), self.three(0), self.images, *self.address())

    def group_norm_silu(self) -> Tensor:
        dropout = Dropout(0.5, self.key, self.index, 1)
        weight, bias = torch.ones(32, device="cuda"), torch.zeros(32, device="cuda")
        return FUSED.group_norm_silu(self.x, weight, bias, 8, dropout=dropout)

    def timestep_embedding(self) -> Tensor:
        return FUSED.timestep_embedding(self.t, 64)

    def reverse_step(self) -> Tensor:
        x, prediction = self.three(0), self.three(3)
        FUSED.reverse_step(x, prediction, self.rows, self.step, self.key, self.index, clip=True, noisy=True)
        return x

    def adam_ema(self) -> Tensor:
        weights, exp_avg, exp_avg_sq, ema, gradient = self.x.abs().flatten(1)[0].repeat(5, 1).unbind()
        numbers, figures = self.numbers.clone(), torch.zeros(3, device="cuda")
        state = (weights, exp_avg, exp_avg_sq, ema, gradient, self.table.sum(), numbers, figures)
        rates = {"learning_rate": 0.1, "warmup_steps": 9, "steps": 90, "cooldown_steps": 9}
        FUSED.adam_ema(*state, None, **rates, beta2=0.999, clip_norm=1.0, ema_decay=0.9)
        return weights


@pytest.mark.parametrize("op", OPS)
def test_a_launch_does_not_wait(op):
    call = Call(op)
    call.run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPS)
def test_a_captured_launch_reads_what_changed(op):
    call = Call(op)
    before = call.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call.run()
    graph.replay()
    assert torch.equal(replayed, before)
    call.changing.add_(1)
    if op == "timestep_embedding":
        call.changing.clamp_(max=999)
    graph.replay()
    assert torch.equal(replayed, call.run())
    assert not torch.equal(replayed, before)
