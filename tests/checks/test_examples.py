"""Each fault planted into the order of the data, or into initial weights, is named by the right stage and file."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_fast.checks.examples import check_examples
from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.checks.weights import check_weights
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.data import batches
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.engine.trainer import Trainer, new_unet
from ddpm_fast.model import unet
from tests.checks.planting import list_of_faults

CPU = torch.device("cpu")
UNET = UNetConfig(3, 6, 10, 4, (1,), res_blocks=1, attention_resolutions=(), groups=2)
CONFIG = Config("digits", UNET, DiffusionConfig(50, "cosine"), DataConfig(flip=True), TrainingConfig(batch_size=16))
PIXELS = np.random.default_rng(0).integers(0, 256, (150, 6, 10, 3), dtype=np.uint8)
NOISE, OPS, BATCHES = "diffusion/noise.py", "ops/reference.py", "data/batches.py"
TRAINER, LOOP, MODEL = "engine/trainer.py", "engine/sampling.py", "model/unet.py"
FAULTS, fault = list_of_faults()


def everything(config: Config = CONFIG) -> Iterator[CheckResult]:
    yield from check_weights(new_unet(config, CPU), config)
    yield from check_examples(config, Dataset(PIXELS, "", ""), CPU)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, data=DataConfig(), training=TrainingConfig(batch_size=1, seed=2**64 - 1)),
        replace(CONFIG, diffusion=DiffusionConfig(1, "cosine"), training=TrainingConfig(seed=2**32)),
    ],
)
def test_sound_draws_pass(config):
    assert [result for result in everything(config) if not result.passed] == []


@pytest.mark.parametrize("count", [1, 2, 5, 19, 20])
def test_few_images_pass(count):
    few = Dataset(PIXELS[:count], "", "")
    assert all(result.passed for result in check_examples(CONFIG, few, CPU, full=True))


@fault("order", BATCHES)
def half_of_the_data_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    order = batches.ExampleOrder
    monkeypatch.setattr(batches, "ExampleOrder", lambda key, count: order(key, (count + 1) // 2))


@fault("order", BATCHES)
def the_last_image_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    order = batches.permutation
    monkeypatch.setattr(batches, "permutation", lambda key, epoch, n: order(key, epoch, n).clamp(max=n - 2))


@fault("order", BATCHES)
def epochs_repeat_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = batches.permutation
    monkeypatch.setattr(batches, "permutation", lambda key, epoch, n: order(key, min(epoch, 1), n))


@fault("order", BATCHES)
def epochs_turn_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = batches.permutation
    monkeypatch.setattr(batches, "permutation", lambda key, epoch, n: order(key, 0, n).roll(7 * epoch))


@fault("order", BATCHES)
def data_not_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "permutation", lambda key, epoch, n: torch.arange(n))


@fault("order", BATCHES)
def data_shuffled_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    order = batches.permutation

    def by_parts(key, epoch, n):
        return torch.cat([order(key, epoch, min(25, n - at)) + at for at in range(0, n, 25)])

    monkeypatch.setattr(batches, "permutation", by_parts)


@fault("order", BATCHES)
def seed_ignored_by_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = batches.permutation
    monkeypatch.setattr(batches, "permutation", lambda key, *rest: order(key * 0, *rest))


@fault("order", BATCHES)
def straddling_batches_stay_in_their_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def indices(self, first, n):
        epoch, position = divmod(first, self.count)
        return self._order(epoch)[(position + torch.arange(n)) % self.count]

    monkeypatch.setattr(batches.ExampleOrder, "indices", indices)


@fault("order", TRAINER)
def steps_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Trainer.load_batch

    def overlapping(self):
        self.step = self.step // 2
        load(self)

    monkeypatch.setattr(Trainer, "load_batch", overlapping)


@fault("order", TRAINER)
def examples_numbered_from_0_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Trainer.load_batch

    def renumbered(self):
        load(self)
        self.sample_index.copy_(torch.arange(len(self.sample_index)))

    monkeypatch.setattr(Trainer, "load_batch", renumbered)


@fault("data", BATCHES)
def batches_in_bgr(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batches.BatchSource.batch

    def bgr(self, *given):
        images, numbers = batch(self, *given)
        return images.flip(1), numbers

    monkeypatch.setattr(batches.BatchSource, "batch", bgr)


@fault("data", BATCHES)
def rows_and_columns_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batches.BatchSource.batch

    def turned(self, *given):
        images, numbers = batch(self, *given)
        return images.transpose(2, 3), numbers

    monkeypatch.setattr(batches.BatchSource, "batch", turned)


@fault("order", BATCHES)
def seeds_high_word_lost_by_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = batches.permutation
    monkeypatch.setattr(batches, "permutation", lambda key, *rest: order(key * torch.tensor([1, 0]), *rest))


def with_weights(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    initialize = unet.UNet.initialize

    def changed(self):
        initialize(self)
        with torch.no_grad():
            change(self)

    monkeypatch.setattr(unet.UNet, "initialize", changed)


@fault("weights", MODEL)
def weights_twice_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    with_weights(monkeypatch, lambda network: network.conv_in.weight.mul_(2))


@fault("weights", MODEL)
def normal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with_weights(monkeypatch, lambda network: network.time_embedding.linear_2.weight.normal_(std=0.25))


@fault("weights", MODEL)
def outputs_not_near_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    with_weights(monkeypatch, lambda network: network.conv_out.weight.mul_(1e5))


@fault("weights", MODEL)
def constant_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with_weights(monkeypatch, lambda network: network.conv_in.weight.fill_(0.1))


@fault("weights", MODEL)
def biases_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with_weights(monkeypatch, lambda network: network.conv_in.bias.uniform_(-0.1, 0.1))


@fault("weights", MODEL)
def layers_that_begin_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    with_weights(monkeypatch, lambda n: n.mid_block.resnets[0].conv1.weight.copy_(n.mid_block.resnets[1].conv1.weight))


@fault("weights", TRAINER)
def seed_ignored_by_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda _: seed(0))


@fault("weights", TRAINER)
def seeds_high_word_lost_by_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.engine.trainer.KEY_INCREMENTS", (0, 0))


@pytest.mark.parametrize(("plant", "stage", "file"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS])
def test_a_planted_fault_is_named(monkeypatch, plant, stage, file):
    plant(monkeypatch)
    first = next(result for result in everything() if result.verdict is Verdict.WRONG)
    assert first.stage == stage
    assert file in first.file


def test_training_on_images_that_are_held_out_is_named(monkeypatch):
    config, dataset = replace(CONFIG, data=DataConfig(holdout=0.1)), Dataset(PIXELS, "", "")
    assert all(result.passed for result in check_examples(config, dataset, CPU))
    monkeypatch.setattr(batches.BatchSource, "_rows", lambda self, *given: self.order.indices(*given))
    wrong = [result for result in check_examples(config, dataset, CPU) if not result.passed]
    assert [(result.stage, result.verdict) for result in wrong] == [("order", Verdict.WRONG)]
    assert BATCHES in wrong[0].file


def test_a_layer_of_somebodys_own_is_only_said():
    network = new_unet(CONFIG, CPU)
    network.conv_in.extra = torch.nn.Parameter(torch.full((3, 3), 7.0))
    results = [result for result in check_weights(network, CONFIG) if not result.passed]
    assert [(result.verdict, result.stage) for result in results] == [(Verdict.CHANGED, "weights")]


def test_a_branch_that_begins_too_large_is_measured_by_xaviers_own_and_told_what_is_right():
    network = new_unet(CONFIG, CPU)
    weight = network.get_parameter("mid_block.resnets.0.conv2.weight")
    torch.nn.init.xavier_uniform_(weight, gain=0.1, generator=torch.Generator().manual_seed(0))
    (wrong,) = (result for result in check_weights(network, CONFIG) if not result.passed)
    found = re.fullmatch(
        r"1 layer otherwise, e.g. mid_block.resnets.0.conv2.weight has (\S+) times Xavier's variance "
        r"\(1e-10 is right\), and at most (\S+) times its bound \(1e-05 is right\)",
        wrong.found,
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(0.1**2, rel=0.2)
    assert float(found[2]) == pytest.approx(0.1, rel=0.02)
