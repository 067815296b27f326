"""The U-Net against the textbook's: faults and changes planted in the engine, each of which must be named."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddpm_fast.checks import stand_in, training
from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.checks.stand_in import affordable, flop_of, small_trainer
from ddpm_fast.checks.training import check_training
from ddpm_fast.config import Config, TrainingConfig, UNetConfig
from ddpm_fast.model import blocks
from ddpm_fast.model.unet import UNet
from ddpm_fast.presets import PRESETS
from tests.checks.faults_in_the_network import (
    change_source,
    change_unet,
    detached_embedding,
    detached_in_a_block,
    detached_skips,
    dropout_not_scaled,
    dropout_of_the_first_64_examples,
    dropout_twice_as_likely,
    dropout_where_the_noise_is,
    gradient_left_from_the_step_before,
    gradient_of_narrow_norms_is_off,
    gradient_scaled_in_a_block,
    half_of_the_loss_is_not_differentiated,
    no_dropout,
    only_the_last_part_counts,
    the_same_places_in_every_example,
    the_same_places_in_every_layer,
    weights_of_upsampling_learn_nothing_in_large_batches,
)
from tests.checks.other_networks import (
    a_residual_around_the_network,
    a_residual_forgotten_in_attention,
    a_shortcut_forgotten,
    another_block,
    attention_unscaled,
    bias_of_conv1_forgotten,
    cosines_first,
    half_a_time_embedding,
    no_silu_in_the_time_embedding,
    no_skips,
    no_time_embedding,
    output_clamped,
    pytorchs_eps_in_narrow_norms,
    pytorchs_group_norm_eps,
    relu_for_silu,
    shifts_of_other_blocks,
    silu_of_the_output_forgotten,
    skips_scaled,
    smooth_upsampling,
    symmetric_padding,
    t_ends_at_500,
)

CONFIG = Config(
    unet=UNetConfig(1, 4, 4, 4, (1, 1), res_blocks=1, attention_resolutions=(2,), dropout=0.2, groups=2),
    training=TrainingConfig(
        batch_size=4, accumulate=2, learning_rate=1e-3, warmup_steps=100, ema_decay=0.999, precision="fp32"
    ),
)
UNET, BLOCKS, REFERENCE = (f"ddpm_fast/{name}.py" for name in ("model/unet", "model/blocks", "ops/reference"))
FLAT = "ddpm_fast/engine/flat_weights.py"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what does not look at the network."""
    monkeypatch.setattr(stand_in, "EXAMPLES", 4)
    for name in ("check_batch", "check_table", "check_loss", "check_updates"):
        monkeypatch.setattr(training, name, lambda *given: ())
    fits = CheckResult("fit", "left out", Verdict.RIGHT, "", "", "")
    monkeypatch.setattr(training, "check_fit", lambda *given: fits)


def batch(first: int, n: int) -> tuple[Tensor, Tensor]:
    number = torch.arange(first, first + n)
    images = (number[:, None] * 37 + torch.arange(16) ** 2 * (3 + number[:, None] % 61)) % 256
    return images.to(torch.uint8).view(n, 1, 4, 4), number


def unusual(config: Config = CONFIG) -> list[CheckResult]:
    """Return what is not right, the first to look at first."""
    trainer = small_trainer(config, batch, torch.device("cpu"))
    found = [result for result in check_training(trainer, config) if not result.passed]
    return sorted(found, key=lambda result: result.verdict is not Verdict.WRONG)


def test_an_unbroken_network_passes():
    assert unusual() == []


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (detached_in_a_block, "gradient", BLOCKS),
    (gradient_scaled_in_a_block, "gradient", BLOCKS),
    (detached_embedding, "gradient", UNET),
    (detached_skips, "gradient", BLOCKS),
    (dropout_twice_as_likely, "dropout", BLOCKS),
    (the_same_places_in_every_layer, "dropout", BLOCKS),
    (the_same_places_in_every_example, "dropout", REFERENCE),
    (dropout_where_the_noise_is, "dropout", REFERENCE),
    (dropout_of_the_first_64_examples, "dropout", REFERENCE),
    (no_dropout, "dropout", BLOCKS),
    (dropout_not_scaled, "dropout", REFERENCE),
    (gradient_of_narrow_norms_is_off, "gradient", "cpu_group_norm.py"),
    (weights_of_upsampling_learn_nothing_in_large_batches, "gradient", BLOCKS),
    (half_of_the_loss_is_not_differentiated, "gradient", UNET),
    (gradient_left_from_the_step_before, "gradient", FLAT),
    (only_the_last_part_counts, "gradient", FLAT),
]


@pytest.mark.parametrize(("plant", "stage", "file"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_fault_is_named(monkeypatch, plant, stage, file):
    plant(monkeypatch)
    found = unusual()
    assert (found[0].stage, found[0].verdict) == (stage, Verdict.WRONG)
    assert file in found[0].file
    assert {result.stage for result in found} == {stage}


CHANGES: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (attention_unscaled, "down_blocks.1.attentions.0: its output", BLOCKS),
    (a_shortcut_forgotten, "mid_block.resnets.0: its output", BLOCKS),
    (relu_for_silu, "", REFERENCE),
    (pytorchs_group_norm_eps, "", REFERENCE),
    (skips_scaled, "up_blocks.0.resnets.0: its input", UNET),
    (no_skips, "up_blocks.0.resnets.0: its input", UNET),
    (a_residual_around_the_network, "all of it: its output", UNET),
    (output_clamped, "all of it: its output", UNET),
    (silu_of_the_output_forgotten, "conv_out: its input", UNET),
    (no_time_embedding, "", UNET),
    (half_a_time_embedding, "", UNET),
    (bias_of_conv1_forgotten, "", UNET),
    (shifts_of_other_blocks, "", UNET),
    (t_ends_at_500, "", UNET),
    (cosines_first, "", REFERENCE),
    (pytorchs_eps_in_narrow_norms, "", "cpu_group_norm.py"),
    (no_silu_in_the_time_embedding, "", UNET),
    (symmetric_padding, "down_blocks.0.downsamplers.0: its output", BLOCKS),
    (smooth_upsampling, "up_blocks.0.upsamplers.0: its output", BLOCKS),
    (a_residual_forgotten_in_attention, "down_blocks.1.attentions.0: its output", BLOCKS),
    (another_block, "with down_blocks.0.resnets.0.gate", BLOCKS),
]


@pytest.mark.parametrize(("plant", "where", "file"), CHANGES, ids=[change[0].__name__ for change in CHANGES])
def test_another_network_is_told_and_trains(monkeypatch, plant, where, file):
    plant(monkeypatch)
    found = unusual()
    assert {(result.stage, result.verdict) for result in found} == {("network", Verdict.CHANGED)}
    assert any(where in result.found for result in found)
    assert file in found[0].file


def test_skips_in_the_wrong_order_are_named(monkeypatch):
    change_source(monkeypatch, UNet, "denoise", "skips.pop()", "skips.pop(0)")
    one_level = replace(CONFIG.unet, channel_multipliers=(1,), attention_resolutions=())
    (found,) = unusual(replace(CONFIG, unet=one_level))
    assert (found.verdict, found.file) == (Verdict.CHANGED, UNET)
    assert "up_blocks.0.resnets.0: its input" in found.found


@pytest.mark.parametrize("another", [None, attention_unscaled, another_block])
def test_another_network_with_a_wrong_gradient_fails(monkeypatch, another):
    if another is not None:
        another(monkeypatch)
    detached_in_a_block(monkeypatch)
    found = unusual()
    assert (found[0].stage, found[0].verdict) == ("gradient", Verdict.WRONG)
    assert "mid_block.resnets.1.conv1.weight" in found[0].found + found[0].expected


def test_a_frozen_layer_is_named(monkeypatch):
    change_unet(monkeypatch, lambda unet: unet.conv_in.requires_grad_(False))
    (found,) = unusual()
    assert (found.stage, found.verdict) == ("gradient", Verdict.CHANGED)
    assert "conv_in.weight and 1 more" in found.found


def test_upsampling_of_large_batches_by_another_weight_is_told(monkeypatch):
    add_up = blocks.added_up
    monkeypatch.setattr(blocks, "added_up", lambda weight: add_up(weight.flip(2)))
    (found,) = unusual()
    assert (found.stage, found.verdict, found.file) == ("network", Verdict.CHANGED, BLOCKS)


def test_a_network_that_takes_too_long_is_reduced_and_stays_of_its_kind():
    for name, config in PRESETS.items():
        small = affordable(config.unet, 2e9)
        assert (small == config.unet) == (name in ("digits", "mnist", "icons32"))
        assert flop_of(small) <= 2e9
        assert small.channels // small.groups == config.unet.channels // config.unet.groups
        assert len(small.attention_resolutions) == len(config.unet.attention_resolutions)
        assert small.channel_multipliers == config.unet.channel_multipliers


@pytest.mark.parametrize(
    "unet",
    [
        UNetConfig(3, 32, 32, 96, (1, 2), groups=3, attention_resolutions=(16,)),
        UNetConfig(3, 32, 32, 128, (1, 2), groups=1, attention_resolutions=()),
        UNetConfig(3, 36, 60, 128, (1, 1, 2), attention_resolutions=(9,)),
        UNetConfig(1, 37, 41, 128, (1,), attention_resolutions=()),
    ],
    ids=["odd-groups", "one-group", "sides-that-halve-no-more", "odd-sides"],
)
def test_any_network_is_reduced(unet):
    assert flop_of(affordable(unet, 1e8)) <= 1e8
