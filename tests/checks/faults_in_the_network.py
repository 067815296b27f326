"""Faults in the network and its gradient, planted in the engine."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_fast.config import UNetConfig
from ddpm_fast.constants import Stream
from ddpm_fast.engine.flat_weights import FlatWeights
from ddpm_fast.model import blocks
from ddpm_fast.model.unet import TimeEmbedding, UNet
from ddpm_fast.ops import cpu_group_norm, reference


def change_unet(monkeypatch: pytest.MonkeyPatch, change: Callable[[UNet], object]) -> None:
    """Change every U-Net once it is built."""
    build = UNet.__init__

    def changed(self: UNet, config: UNetConfig) -> None:
        build(self, config)
        change(self)

    monkeypatch.setattr(UNet, "__init__", changed)


def change_output(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let a module of the U-Net return what is made of its input and output."""

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return change(given[0], output)

    change_unet(monkeypatch, lambda unet: unet.get_submodule(name).register_forward_hook(hook))


def change_source(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, old: str, new: str) -> None:
    """Let a method be what it is with a few characters exchanged."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, method)))
    assert old in source
    namespace = vars(inspect.getmodule(owner)).copy()
    exec(source.replace(old, new), namespace)
    monkeypatch.setattr(owner, method, namespace[method])


def detached_in_a_block(monkeypatch):
    change_output(monkeypatch, "mid_block.resnets.1.conv1", lambda x, h: h.detach())


def gradient_scaled_in_a_block(monkeypatch):
    change_output(monkeypatch, "mid_block.resnets.0.conv1", lambda x, h: h * 0.5 + (h * 0.5).detach())


def detached_skips(monkeypatch):
    change_source(monkeypatch, UNet, "denoise", "skips.append(h)", "skips.append(h.detach())")


def detached_embedding(monkeypatch):
    forward = TimeEmbedding.forward
    monkeypatch.setattr(TimeEmbedding, "forward", lambda self, s: forward(self, s).detach())


def dropout_twice_as_likely(monkeypatch):
    def change(unet):
        for block in unet.res_blocks():
            block.dropout *= 2

    change_unet(monkeypatch, change)


def the_same_places_in_every_layer(monkeypatch):
    def change(unet):
        for block in unet.res_blocks():
            block.layer = 0

    change_unet(monkeypatch, change)


def the_same_places_in_every_example(monkeypatch):
    words = reference.random_words_below

    def of_one(address, *rest):
        return words(address._replace(sample_index=address.sample_index * 0 + address.sample_index[0]), *rest)

    monkeypatch.setattr(reference, "random_words_below", of_one)


def dropout_where_the_noise_is(monkeypatch):
    words = reference.random_words_below
    monkeypatch.setattr(
        reference,
        "random_words_below",
        lambda address, step, stream, *rest: words(address, step, Stream.TRAINING, *rest),
    )


def dropout_of_the_first_64_examples(monkeypatch):
    words = reference.random_words_below
    monkeypatch.setattr(
        reference,
        "random_words_below",
        lambda address, *rest: words(address._replace(sample_index=address.sample_index % 64), *rest),
    )


def no_dropout(monkeypatch):
    forward = UNet.denoise
    monkeypatch.setattr(UNet, "denoise", lambda self, x, shifts, address=None: forward(self, x, shifts))


def dropout_not_scaled(monkeypatch):
    norm = reference.group_norm_silu

    def unscaled(*given, dropout=None, **options):
        y = norm(*given, dropout=dropout, **options)
        return y if dropout is None else y * (1 - dropout.probability)

    use_norm(monkeypatch, unscaled)


def use_norm(monkeypatch: pytest.MonkeyPatch, norm: Callable[..., Tensor]) -> None:
    monkeypatch.setattr("ddpm_fast.ops.REFERENCE", replace(reference_ops(), group_norm_silu=norm))


def reference_ops() -> Any:
    from ddpm_fast import ops

    return ops.REFERENCE


def gradient_of_narrow_norms_is_off(monkeypatch):
    """What a small batch never runs, and a CPU's large one does."""
    original = cpu_group_norm._NarrowGroupNorm

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            return original.forward(ctx, *given)

        @staticmethod
        def backward(ctx, *grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            dx, *rest = original.backward(ctx, *grad)
            assert dx is not None
            return 0.9 * dx, *rest

    monkeypatch.setattr(cpu_group_norm, "_NarrowGroupNorm", Wrong)


def weights_of_upsampling_learn_nothing_in_large_batches(monkeypatch):
    """What a small batch never runs."""
    add_up = blocks.added_up
    monkeypatch.setattr(blocks, "added_up", lambda weight: add_up(weight.detach()))


def half_of_the_loss_is_not_differentiated(monkeypatch):
    forward = UNet.forward

    def half(self, x, t, **rest):
        y = forward(self, x, t, **rest)
        return torch.cat([y[:, :, :2], y[:, :, 2:].detach()], dim=2)

    monkeypatch.setattr(UNet, "forward", half)


def gradient_left_from_the_step_before(monkeypatch):
    collect = FlatWeights.collect_gradients
    monkeypatch.setattr(FlatWeights, "collect_gradients", lambda self, add: collect(self, add=True))


def only_the_last_part_counts(monkeypatch):
    collect = FlatWeights.collect_gradients
    monkeypatch.setattr(FlatWeights, "collect_gradients", lambda self, add: collect(self, add=False))
