"""Labels and guidance: each fault planted into the engine is named by the right stage and file; a sound one passes."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast.checks import stand_in
from ddpm_fast.checks.labels import check_labels
from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.checks.sampling import check_loops
from ddpm_fast.checks.stand_in import perturb, small_trainer
from ddpm_fast.checks.training import check_training
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.engine import sampling
from ddpm_fast.engine import trainer as engine
from ddpm_fast.engine.execution import EAGER, Execution
from ddpm_fast.model.unet import ClassEmbedding, UNet
from tests.checks.planting import list_of_faults
from tests.engine.test_cuda_graphs import StandIn

CPU, CLASSES = torch.device("cpu"), 5
CONFIG = Config(
    unet=UNetConfig(1, 4, 4, 4, (1, 1), 1, (2,), dropout=0.2, groups=2, num_classes=CLASSES),
    data=DataConfig(flip=True),
    training=TrainingConfig(
        batch_size=4, accumulate=2, learning_rate=1e-3, warmup_steps=100, label_dropout=0.3, precision="fp32"
    ),
)
DIFFUSION = DiffusionConfig(60, "cosine")
DATA = Dataset(np.zeros((97, 4, 4, 1), np.uint8), "", "", labels=np.arange(97) % CLASSES)
BATCHES, TRAINER, MODEL = "data/batches.py", "engine/trainer.py", "model/unet.py"
SAMPLING = "engine/sampling.py"
FAULTS, fault = list_of_faults()
AT_NETWORK, at_network = list_of_faults()
IN_LOOPS, in_loops = list_of_faults()


@pytest.fixture(autouse=True)
def few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "EXAMPLES", 4)


def batch(first: int, n: int) -> tuple[Tensor, ...]:
    number = torch.arange(first, first + n)
    images = (number[:, None] * 37 + torch.arange(16) ** 2 * (3 + number[:, None] % 61)) % 256
    return images.to(torch.uint8).view(n, 1, 4, 4), number, number * number % 7 % CLASSES


def in_training(config: Config = CONFIG) -> Iterator[CheckResult]:
    yield from check_training(small_trainer(config, batch, CPU), config)


def in_sampling(execution: Execution = EAGER) -> Iterator[CheckResult]:
    torch.manual_seed(0)
    graphs = StandIn() if execution.captured else None
    yield from check_loops(perturb(UNet(CONFIG.unet)), DIFFUSION, execution=execution, graphs=graphs)


def unusual(results: Iterator[CheckResult]) -> list[CheckResult]:
    found = [result for result in results if not result.passed]
    return sorted(found, key=lambda result: result.verdict is not Verdict.WRONG)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_sound_labels_pass(share, holdout):
    config = replace(CONFIG, training=replace(CONFIG.training, label_dropout=share), data=DataConfig(holdout=holdout))
    assert unusual(check_labels(config, DATA, CPU)) == []


def test_sound_training_and_sampling_pass():
    assert unusual(in_training()) == []
    assert unusual(in_sampling(Execution(captured=True))) == []


def test_an_unconditional_run_has_no_labels_to_check():
    assert list(check_labels(replace(CONFIG, unet=replace(CONFIG.unet, num_classes=0)), DATA, CPU)) == []


@fault("labels", BATCHES)
def labels_shifted_by_one(monkeypatch):
    take = BatchSource.batch

    def shifted(self, first, n):
        return *take(self, first, n)[:2], take(self, first + 1, n)[2]

    monkeypatch.setattr(BatchSource, "batch", shifted)


@fault("labels", BATCHES)
def labels_of_the_data_in_order(monkeypatch):
    take = BatchSource.batch

    def in_order(self, first, n):
        return *take(self, first, n)[:2], self.labels[torch.arange(first, first + n) % len(self.labels)]

    monkeypatch.setattr(BatchSource, "batch", in_order)


def drop(monkeypatch, change):
    drops = engine.random_label_drops
    monkeypatch.setattr(engine, "random_label_drops", lambda address, p: change(drops, address, p))


@fault("labels", TRAINER)
def none_withheld(monkeypatch):
    drop(monkeypatch, lambda drops, address, p: drops(address, 0.0))


@fault("labels", TRAINER)
def withheld_half_as_often(monkeypatch):
    drop(monkeypatch, lambda drops, address, p: drops(address, p / 2))


@fault("labels", TRAINER)
def the_others_withheld(monkeypatch):
    drop(monkeypatch, lambda drops, address, p: ~drops(address, 1 - p))


@fault("labels", TRAINER)
def the_same_withheld_for_every_seed(monkeypatch):
    drop(monkeypatch, lambda drops, address, p: drops(address._replace(key=address.key * 0 + 1), p))


@fault("labels", TRAINER)
def another_label_where_it_is_withheld(monkeypatch):
    fill = Tensor.masked_fill
    monkeypatch.setattr(Tensor, "masked_fill", lambda self, mask, value: fill(self, mask, 0))


@pytest.mark.parametrize(("plant", "stage", "file"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_fault_of_labels_is_named(monkeypatch, plant, stage, file):
    plant(monkeypatch)
    found = unusual(check_labels(CONFIG, DATA, CPU))
    assert {(result.stage, result.verdict) for result in found} == {(stage, Verdict.WRONG)}
    assert file in found[0].file


@at_network("labels", MODEL)
def embedding_not_added(monkeypatch):
    monkeypatch.setattr(UNet, "embed", lambda self, t, labels=None: self.embed_time(t))


@at_network("labels", MODEL)
def one_row_for_all(monkeypatch):
    embed = UNet.embed
    monkeypatch.setattr(UNet, "embed", lambda self, t, labels=None: embed(self, t, None))


@at_network("labels", TRAINER)
def labels_of_the_first_part_for_all_parts(monkeypatch):
    losses = engine.Trainer._losses_of_batch

    def of_the_first(self, images, numbers, labels=None):
        return losses(self, images, numbers, self.loaded[2][: len(images)])

    monkeypatch.setattr(engine.Trainer, "_losses_of_batch", of_the_first)


@pytest.mark.parametrize(("plant", "stage", "file"), AT_NETWORK, ids=[fault[0].__name__ for fault in AT_NETWORK])
def test_a_network_that_is_not_told_is_named(monkeypatch, plant, stage, file):
    plant(monkeypatch)
    found = unusual(in_training())
    assert (found[0].stage, found[0].verdict) == (stage, Verdict.WRONG)
    assert file in found[0].file


def test_another_embedding_is_told_and_trains(monkeypatch):
    row = ClassEmbedding.forward
    monkeypatch.setattr(ClassEmbedding, "forward", lambda self, labels: 2 * row(self, labels))
    found = unusual(in_training())
    assert {(result.stage, result.verdict) for result in found} == {("network", Verdict.CHANGED)}
    assert any("what the timestep adds differs" in result.found for result in found)


def test_a_wrong_gradient_of_the_embedding_is_named(monkeypatch):
    row = ClassEmbedding.forward
    monkeypatch.setattr(ClassEmbedding, "forward", lambda self, labels: row(self, labels).detach())
    found = unusual(in_training())
    assert (found[0].stage, found[0].verdict) == ("gradient", Verdict.WRONG)
    assert "class_embedding.weight" in found[0].expected


def mix(monkeypatch, change):
    monkeypatch.setattr(sampling, "guided", change)


@in_loops("network", SAMPLING)
def guidance_of_the_wrong_sign(monkeypatch):
    mix(monkeypatch, lambda own, other, strength: other - strength * (own - other))


@in_loops("network", SAMPLING)
def halves_exchanged(monkeypatch):
    mix(monkeypatch, lambda own, other, strength: own + strength * (other - own))


@in_loops("network", SAMPLING)
def guided_by_one_too_much(monkeypatch):
    mix(monkeypatch, lambda own, other, strength: own + strength * (own - other))


@in_loops("network", SAMPLING)
def not_guided(monkeypatch):
    mix(monkeypatch, lambda own, other, strength: own)


@in_loops("network", SAMPLING)
def labels_of_the_next_image(monkeypatch):
    condition = sampling.ImageRange.condition
    monkeypatch.setattr(sampling.ImageRange, "condition", lambda self, numbers: condition(self, numbers + 1))


@in_loops("network", SAMPLING)
def labels_ignored(monkeypatch):
    monkeypatch.setattr(sampling.ImageRange, "condition", lambda self, n: sampling.Condition(None, self.guidance))


@pytest.mark.parametrize(("plant", "stage", "file"), IN_LOOPS, ids=[fault[0].__name__ for fault in IN_LOOPS])
def test_a_fault_of_guidance_is_named(monkeypatch, plant, stage, file):
    plant(monkeypatch)
    found = unusual(in_sampling())
    assert {(result.stage, result.verdict) for result in found} == {(stage, Verdict.WRONG)}
    assert file in found[0].file


def test_a_loop_that_keeps_the_labels_of_its_first_batch_is_named(monkeypatch):
    monkeypatch.setattr(sampling.Buffers, "ask", lambda self, condition: None)
    assert {result.stage for result in unusual(in_sampling())} == {"network"}
