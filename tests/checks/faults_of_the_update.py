"""Faults on the way from a gradient to weights and their average, planted in the engine."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ddpm_fast.config import TrainingConfig
from ddpm_fast.engine.flat_weights import FlatWeights
from ddpm_fast.ops import reference


def rate_100_times_too_high(monkeypatch):
    rate = reference.learning_rate_at
    monkeypatch.setattr(reference, "learning_rate_at", lambda *given: 100 * rate(*given))


def rate_never_applied(monkeypatch):
    monkeypatch.setattr(reference, "learning_rate_at", lambda step, *rest: torch.zeros(()))


def no_warm_up(monkeypatch):
    monkeypatch.setattr(reference, "learning_rate_at", lambda step, rate, *rest: torch.tensor(rate))


def warm_up_one_step_late(monkeypatch):
    rate = reference.learning_rate_at
    monkeypatch.setattr(reference, "learning_rate_at", lambda step, *rest: rate(step - 1, *rest))


def rate_that_decays(monkeypatch):
    rate = reference.learning_rate_at
    monkeypatch.setattr(reference, "learning_rate_at", lambda step, *rest: rate(step, *rest) * 0.99999**step)


def change_rate(monkeypatch: pytest.MonkeyPatch, change: Callable[..., tuple[int, int]]) -> None:
    def changed(step, learning_rate, warmup_steps, *rest):
        return rate(step, learning_rate, warmup_steps, *change(*rest))

    rate = reference.learning_rate_at
    monkeypatch.setattr(reference, "learning_rate_at", changed)


def no_cooldown(monkeypatch):
    change_rate(monkeypatch, lambda steps, cooldown_steps: (steps, 0))


def cooldown_one_step_late(monkeypatch):
    change_rate(monkeypatch, lambda steps, cooldown_steps: (steps + 1, cooldown_steps))


def cooldown_over_half_the_steps(monkeypatch):
    change_rate(monkeypatch, lambda steps, cooldown_steps: (steps, steps // 2))


def cooldown_by_a_cosine(monkeypatch):
    def cosine(step, rate, warmup_steps, steps, cooldown_steps):
        left = ((steps - step).double() / cooldown_steps).clamp(max=0.999)
        return at(step, rate, warmup_steps, steps, 0) * (1 - torch.cos(torch.pi * left**0.5)) / 2

    at = reference.learning_rate_at
    monkeypatch.setattr(reference, "learning_rate_at", cosine)


def betas_exchanged(monkeypatch):
    change_adam(monkeypatch, beta1=0.999, beta2=0.9)


def another_beta(monkeypatch):
    change_adam(monkeypatch, beta2=0.95)


def another_adam_eps(monkeypatch):
    monkeypatch.setattr(reference, "ADAM_EPS", 1e-6)


def change_adam(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    adam = torch._fused_adam_
    monkeypatch.setattr(torch, "_fused_adam_", lambda *given, **options: adam(*given, **(options | changes)))


def weight_decay(monkeypatch):
    change_adam(monkeypatch, weight_decay=1e-2)


def gradient_ascent(monkeypatch):
    change_adam(monkeypatch, maximize=True)


def no_bias_correction(monkeypatch):
    adam = torch._fused_adam_

    def late(weights, gradients, m, v, largest, steps, **options):
        adam(weights, gradients, m, v, largest, [steps[0] + 10_000], **options)

    monkeypatch.setattr(torch, "_fused_adam_", late)


def change_update(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[FlatWeights, TrainingConfig], TrainingConfig]
) -> None:
    update = FlatWeights.update
    monkeypatch.setattr(FlatWeights, "update", lambda self, loss, c: update(self, loss, change(self, c)))


def one_parameter_never_updated(monkeypatch):
    update = FlatWeights.update

    def without_one(self, *given):
        left_out = self.named(self.weights)["mid_block.attentions.0.to_v.weight"]
        before = left_out.clone()
        update(self, *given)
        left_out.copy_(before)

    monkeypatch.setattr(FlatWeights, "update", without_one)


def no_clipping(monkeypatch):
    change_update(monkeypatch, lambda flat, config: replace(config, clip_norm=0.0))


def clipped_at_ten_times(monkeypatch):
    change_update(monkeypatch, lambda flat, config: replace(config, clip_norm=10 * config.clip_norm))


def clipped_though_short(monkeypatch):
    def lengthen(flat, config):
        flat.gradient.mul_(config.clip_norm / flat.gradient.norm())
        return config

    change_update(monkeypatch, lengthen)


def clipped_by_parameter(monkeypatch):
    def clip(flat, config):
        for gradient in flat.gradients.values():
            gradient.mul_((config.clip_norm / 4 / gradient.norm()).clamp(max=1.0))
        return replace(config, clip_norm=0.0)

    change_update(monkeypatch, clip)


def clipped_by_value(monkeypatch):
    def clip(flat, config):
        flat.gradient.clamp_(-0.01, 0.01)
        return replace(config, clip_norm=0.0)

    change_update(monkeypatch, clip)


def average_that_begins_at_zero(monkeypatch):
    build = FlatWeights.__init__

    def from_zero(self, *given):
        build(self, *given)
        self.ema.zero_()

    monkeypatch.setattr(FlatWeights, "__init__", from_zero)


def average_never_moves(monkeypatch):
    monkeypatch.setattr(reference, "ema_decay_at", lambda step, decay: torch.tensor(1.0))


def decay_wrong_late(monkeypatch):
    at = reference.ema_decay_at
    monkeypatch.setattr(reference, "ema_decay_at", lambda step, decay: at(step, 1.0))


def decay_without_warm_up(monkeypatch):
    monkeypatch.setattr(reference, "ema_decay_at", lambda step, decay: torch.tensor(decay))


def average_of_the_weights_before(monkeypatch):
    update = FlatWeights.update

    def late(self, *given):
        ema, before = self.ema.clone(), self.weights.clone()
        update(self, *given)
        self.ema.sub_(self.weights - before, alpha=float(((self.ema - ema) / (self.weights - ema)).median()))

    monkeypatch.setattr(FlatWeights, "update", late)


def average_of_all_but_one(monkeypatch):
    update = FlatWeights.update

    def without_one(self, *given):
        left_out = self.named(self.ema)["conv_out.weight"]
        before = left_out.clone()
        update(self, *given)
        left_out.copy_(before)

    monkeypatch.setattr(FlatWeights, "update", without_one)
