"""Faults on the way from images to a loss, planted in the engine; and the configuration that they are tried with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.constants import TRAINING_COLUMN, TrainingTable
from ddpm_fast.diffusion import schedule
from ddpm_fast.engine import trainer as engine
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.ops import reference
from tests.checks.faults_in_the_network import change_source

UNET = UNetConfig(3, 4, 4, 8, (1,), res_blocks=1, attention_resolutions=(), dropout=0.1, groups=4)
CONFIG = Config(
    unet=UNET,
    data=DataConfig(flip=True),
    training=TrainingConfig(batch_size=16, learning_rate=1e-3, warmup_steps=100, ema_decay=0.999, precision="fp32"),
)
V = replace(CONFIG, diffusion=DiffusionConfig(100, "cosine", prediction="v"))
V = with_training(V, min_snr_gamma=5.0, accumulate=4, timestep_density="laplace")


def replace_op(monkeypatch: pytest.MonkeyPatch, **op: Callable[..., Any]) -> None:
    monkeypatch.setattr(ops, "REFERENCE", replace(ops.REFERENCE, **op))


def change_table(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Config], None]) -> None:
    original = schedule.training_table

    def changed(config, min_snr_gamma=0.0, dtype=torch.float32):
        table = original(config, min_snr_gamma, dtype)
        change(table, replace(CONFIG, diffusion=config))
        return table

    monkeypatch.setattr(schedule, "training_table", changed)
    monkeypatch.setattr(engine, "training_table", changed)


def square_root_forgotten(monkeypatch):
    def change(table, config):
        table[:, TRAINING_COLUMN.signal] = schedule.make_alpha_bar(config.diffusion)

    change_table(monkeypatch, change)


def betas_of_another_schedule(monkeypatch):
    monkeypatch.setattr(
        schedule, "linear_betas", lambda T, start, end: torch.linspace(start**0.5, end**0.5, T).double() ** 2
    )


def v_with_the_wrong_sign(monkeypatch):
    def change(table, config):
        table[:, TRAINING_COLUMN.target_x_start] *= -1

    change_table(monkeypatch, change)


def weight_of_eps_for_v(monkeypatch):
    weights = schedule.loss_weights
    monkeypatch.setattr(schedule, "loss_weights", lambda alpha_bar, prediction, gamma: weights(alpha_bar, "eps", gamma))


def gamma_is_ignored(monkeypatch):
    table = engine.training_table
    monkeypatch.setattr(engine, "training_table", lambda config, gamma: table(config))


def off_by_one_in_t(monkeypatch):
    q_sample = reference.q_sample

    def late(images, t, table, *rest, **options):
        return q_sample(images, (t + 1).clamp(max=len(table) - 1), table, *rest, **options)

    replace_op(monkeypatch, q_sample=late)


def images_in_0_1(monkeypatch):
    normalize = reference._normalize
    monkeypatch.setattr(reference, "_normalize", lambda *given: (normalize(*given) + 1) / 2)


def channels_exchanged(monkeypatch):
    normalize = reference._normalize
    monkeypatch.setattr(reference, "_normalize", lambda *given: normalize(*given).flip(1))


def every_image_flipped(monkeypatch):
    monkeypatch.setattr(
        reference, "random_flips", lambda address: torch.ones_like(address.sample_index, dtype=torch.bool)
    )


def flips_though_told_not_to(monkeypatch):
    normalize = reference._normalize
    monkeypatch.setattr(reference, "_normalize", lambda i, a, flip, d: normalize(i, a, True, d))


def upside_down(monkeypatch):
    normalize = reference._normalize
    monkeypatch.setattr(reference, "_normalize", lambda *given: normalize(*given).flip(2))


def noise_of_q_sample_flipped(monkeypatch):
    q_sample, normal = reference.q_sample, reference.normal

    def flipped(*given, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "normal", lambda *rest: normal(*rest).flip(-1))
            return q_sample(*given, **options)

    replace_op(monkeypatch, q_sample=flipped)


def noise_of_the_last_batch(monkeypatch):
    normal = reference.normal
    monkeypatch.setattr(
        reference,
        "normal",
        lambda address, *rest: normal(address._replace(sample_index=address.sample_index % 16), *rest),
    )


def half_of_the_timesteps(monkeypatch):
    draw = engine.random_timesteps
    monkeypatch.setattr(engine, "random_timesteps", lambda address, total, *rest: draw(address, total // 2, *rest))


def uniform_timesteps_where_laplace_is_asked_for(monkeypatch):
    monkeypatch.setattr(engine, "timestep_thresholds", lambda *given: None)


def the_first_batch_again_and_again(monkeypatch):
    load = Trainer.load_batch

    def first(self):
        step, self.step = self.step, 0
        load(self)
        self.numbers.step.fill_(step)
        self.step = step

    monkeypatch.setattr(Trainer, "load_batch", first)


def every_other_step_is_left_out(monkeypatch):
    change_source(monkeypatch, Trainer, "_count_step", "self.step += 1", "self.step += 2")


def half_of_the_batch(monkeypatch):
    losses = Trainer._losses_of_batch
    monkeypatch.setattr(
        Trainer, "_losses_of_batch", lambda self, i, s: losses(self, i[: len(i) // 2], s[: len(s) // 2])
    )


def change_part(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, int], Tensor]) -> None:
    """Make what a part adds to the loss of its images' losses [n] and the batch's size."""
    monkeypatch.setattr(
        Trainer,
        "_loss_of_batch",
        lambda self, *part: change(self._losses_of_batch(*part), self.config.training.batch_size),
    )


def two_parts_at_most(monkeypatch):
    change_source(monkeypatch, Trainer, "backward", "split(part)", "split(part)[:2]")


def loss_of_half_the_batch(monkeypatch):
    change_part(monkeypatch, lambda losses, n: losses[: len(losses) // 2].sum() / n)


def parts_are_summed(monkeypatch):
    change_part(monkeypatch, lambda losses, n: losses.mean())


def largest_loss_alone(monkeypatch):
    change_part(monkeypatch, lambda losses, n: losses.max())


def the_network_gets_another_t(monkeypatch):
    call = torch.nn.Module.__call__
    monkeypatch.setattr(
        engine.UNet, "__call__", lambda self, x, t, **named: call(self, x, t // 2, **named), raising=False
    )


def the_loss_gets_another_prediction(monkeypatch):
    change_source(
        monkeypatch, Trainer, "_losses_of_batch", "noise_mse(prediction,", "noise_mse(prediction.clamp(-1, 1),"
    )


def the_prediction_is_clamped_in_the_loss(monkeypatch):
    loss = reference.noise_mse

    def clamped(prediction, *rest, **options):
        return loss(prediction.clamp(-0.1, 0.1), *rest, **options)

    replace_op(monkeypatch, noise_mse=clamped)


def change_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make each image's loss of its prediction and target, [N, C, H, W] each."""

    def loss(prediction, images, t, table, key, sample_index, *, flip=False):
        row = TrainingTable(*table[t].view(-1, 5, 1, 1, 1).unbind(1))
        rows = (torch.tensor([row]).expand(len(table), -1) for row in ((0.0, 1.0, 0, 0, 0), (1.0, 0.0, 0, 0, 0)))
        eps, x_start = (reference.q_sample(images, t, of_one, key, sample_index, flip=flip) for of_one in rows)
        target = row.target_eps * eps + row.target_x_start * x_start
        return row.weight.flatten() * change(prediction.to(target.dtype), target)

    replace_op(monkeypatch, noise_mse=loss)


def sign_of_eps_flipped(monkeypatch):
    change_loss(monkeypatch, lambda prediction, target: (prediction + target).square().mean((1, 2, 3)))


def summed_over_channels(monkeypatch):
    change_loss(monkeypatch, lambda prediction, target: (prediction - target).square().sum(1).mean((1, 2)))


def one_channel_only(monkeypatch):
    change_loss(monkeypatch, lambda prediction, target: (prediction - target)[:, :1].square().mean((1, 2, 3)))


def target_detached_from_the_right_side(monkeypatch):
    change_loss(
        monkeypatch,
        lambda prediction, target: (
            (prediction.detach() - target).square().mean((1, 2, 3)) + 0 * prediction.mean((1, 2, 3))
        ),
    )


def huber(monkeypatch):
    def loss(prediction, target):
        return torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=0.5).mean((1, 2, 3))

    change_loss(monkeypatch, loss)
