"""Other networks than the textbook's, planted in the engine; they compute their gradients right."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.model import blocks
from ddpm_fast.model.blocks import Attention, Downsample, ResBlock, Upsample
from ddpm_fast.model.unet import TimeEmbedding, UNet
from ddpm_fast.ops import cpu_group_norm, reference
from tests.checks.faults_in_the_network import change_output, change_source, change_unet, reference_ops


def attention_unscaled(monkeypatch):
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(blocks.F, "scaled_dot_product_attention", lambda q, k, v: attend(q, k, v, scale=1.0))


def a_shortcut_forgotten(monkeypatch):
    change_output(monkeypatch, "mid_block.resnets.0", lambda x, y: y - x)


def relu_for_silu(monkeypatch):
    monkeypatch.setattr(reference, "F", SimpleNamespace(silu=F.relu))


def pytorchs_group_norm_eps(monkeypatch):
    group_norm = reference.group_norm
    monkeypatch.setattr(
        reference, "group_norm", lambda x, groups, weight, bias, eps: group_norm(x, groups, weight, bias, 1e-5)
    )


def pytorchs_eps_in_narrow_norms(monkeypatch):
    """What a small batch never runs, and a CPU's large one does."""
    narrow = cpu_group_norm.narrow_group_norm
    monkeypatch.setattr(cpu_group_norm, "narrow_group_norm", lambda x, g, w, b, eps: narrow(x, g, w, b, 1e-5))


def skips_scaled(monkeypatch):
    change_source(monkeypatch, UNet, "denoise", "skips.append(h)", "skips.append(h * 2**-0.5)")


def no_skips(monkeypatch):
    change_source(monkeypatch, UNet, "denoise", "skips.pop()", "torch.zeros_like(skips.pop())")


def a_residual_around_the_network(monkeypatch):
    change_source(monkeypatch, UNet, "denoise", "(self.conv_norm_out(h))", "(self.conv_norm_out(h)) + x")


def output_clamped(monkeypatch):
    change_source(monkeypatch, UNet, "denoise", "(self.conv_norm_out(h))", "(self.conv_norm_out(h)).clamp(-1, 1)")


def silu_of_the_output_forgotten(monkeypatch):
    change_unet(monkeypatch, lambda unet: setattr(unet.conv_norm_out, "silu", False))


def bias_of(block: ResBlock) -> Tensor:
    assert block.conv1.bias is not None
    return block.conv1.bias


def change_shifts(monkeypatch: pytest.MonkeyPatch, change: Callable[[UNet, Tensor, Tensor], Tensor]) -> None:
    shifts = UNet.time_shifts
    monkeypatch.setattr(UNet, "time_shifts", lambda self, t, *label: change(self, t, shifts(self, t, *label)))


def no_time_embedding(monkeypatch):
    def bias_alone(self, t, shifts):
        return torch.cat([bias_of(block) for block in self.res_blocks()]).expand_as(shifts)

    change_shifts(monkeypatch, bias_alone)


def half_a_time_embedding(monkeypatch):
    change_shifts(monkeypatch, lambda self, t, shifts: shifts / 2)


def bias_of_conv1_forgotten(monkeypatch):
    change_shifts(monkeypatch, lambda self, t, s: s - torch.cat([bias_of(block) for block in self.res_blocks()]))


def shifts_of_other_blocks(monkeypatch):
    change_shifts(monkeypatch, lambda self, t, shifts: shifts.roll(4, dims=1))


def t_ends_at_500(monkeypatch):
    shifts = UNet.time_shifts
    monkeypatch.setattr(UNet, "time_shifts", lambda self, t, *label: shifts(self, t.clamp(max=500), *label))


def cosines_first(monkeypatch):
    embed = reference.timestep_embedding
    monkeypatch.setattr(
        "ddpm_fast.ops.REFERENCE",
        replace(reference_ops(), timestep_embedding=lambda t, dim, *rest: embed(t, dim, *rest).roll(dim // 2, dims=1)),
    )


def no_silu_in_the_time_embedding(monkeypatch):
    monkeypatch.setattr(TimeEmbedding, "forward", lambda self, sinusoids: self.linear_2(self.linear_1(sinusoids)))


def symmetric_padding(monkeypatch):
    monkeypatch.setattr(Downsample, "forward", lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0))))


def smooth_upsampling(monkeypatch):
    monkeypatch.setattr(
        Upsample, "forward", lambda self, x: self.conv(F.interpolate(x, scale_factor=2, mode="bilinear"))
    )


def a_residual_forgotten_in_attention(monkeypatch):
    forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x: forward(self, x) - x)


def another_block(monkeypatch):
    """Every ResBlock ends in a gate that is learned."""
    build, forward = ResBlock.__init__, ResBlock.forward

    def with_gate(self, *given):
        build(self, *given)
        self.gate = nn.Parameter(torch.ones(1))

    monkeypatch.setattr(ResBlock, "__init__", with_gate)
    monkeypatch.setattr(ResBlock, "forward", lambda self, *given: forward(self, *given) * self.gate)
