"""Each fault planted between the trained weights and the pixels is named by the right stage and file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_fast.checks.pictures import check_pictures
from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.checks.saved import check_saved
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.engine import flat_weights
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.runs import checkpoint, grids, trained_model
from ddpm_fast.runs.previews import Previews
from tests.checks.planting import list_of_faults

UNET = UNetConfig(3, 4, 8, 4, (1,), res_blocks=1, attention_resolutions=(), groups=2)
DIFFUSION = DiffusionConfig(30, "cosine", prediction="v", variance="small")
CONFIG = Config("digits", UNET, DIFFUSION, DataConfig(holdout=0.1), TrainingConfig(batch_size=2, seed=3))
GRIDS, CHECKPOINT, MODEL = "runs/grids.py", "runs/checkpoint.py", "runs/trained_model.py"
TRAINER, PREVIEWS, RUN = "engine/trainer.py", "runs/previews.py", "runs/run.py"
STATE = "engine/flat_weights.py"
FAULTS, fault = list_of_faults()


def everything() -> Iterator[CheckResult]:
    yield from check_pictures(CONFIG.unet.image_channels)
    yield from check_saved(CONFIG, torch.device("cpu"))


def test_a_sound_engine_passes():
    results = list(everything())
    assert [result for result in results if not result.passed] == []
    assert len(results) == 17


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pictures_of_every_kind_pass(channels):
    assert all(result.passed for result in check_pictures(channels))


def with_scale(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    scale = grids._scale
    monkeypatch.setattr(grids, "_scale", lambda *given: change(scale(*given)))


@fault("pixels", GRIDS)
def pixels_in_bgr(monkeypatch: pytest.MonkeyPatch) -> None:
    with_scale(monkeypatch, lambda pixels: np.ascontiguousarray(pixels[..., ::-1]))


@fault("pixels", GRIDS)
def pixels_upside_down(monkeypatch: pytest.MonkeyPatch) -> None:
    with_scale(monkeypatch, lambda pixels: np.ascontiguousarray(pixels[:, ::-1]))


@fault("pixels", GRIDS)
def pixels_in_0_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = grids._scale
    monkeypatch.setattr(grids, "to_uint8", lambda samples: scale(samples, 0.0, 1.0))


@fault("pixels", GRIDS)
def pixels_truncated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "to_uint8", lambda x: ((x.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy())


@fault("pixels", GRIDS)
def pixels_that_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "to_uint8", lambda x: ((x + 1) * 127.5).round().int().byte().permute(0, 2, 3, 1).numpy())


@fault("pixels", GRIDS)
def files_in_bgr(monkeypatch: pytest.MonkeyPatch) -> None:
    image = grids.to_image
    monkeypatch.setattr(grids, "to_image", lambda pixels: image(np.ascontiguousarray(pixels[..., ::-1])))


@fault("pixels", GRIDS)
def files_compressed_with_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    image = grids.to_image
    monkeypatch.setattr(grids, "to_image", lambda pixels: image(pixels).quantize(64).convert("RGB"))


@fault("pixels", GRIDS)
def previews_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    save = grids.save_normalized_and_raw
    monkeypatch.setattr(grids, "save_normalized_and_raw", lambda samples, *where: save(samples * 2, *where))


@fault("checkpoint", TRAINER)
def average_never_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    state = Trainer.state
    monkeypatch.setattr(Trainer, "state", lambda self: state(self) | {"ema": dict(self.parameters)})


@fault("checkpoint", CHECKPOINT)
def saved_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.safetensors.torch.save

    def half(tensors):
        return save({name: tensor.bfloat16().to(tensor.dtype) for name, tensor in tensors.items()})

    monkeypatch.setattr(checkpoint.safetensors.torch, "save", half)


@fault("checkpoint", CHECKPOINT)
def timesteps_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoint.from_dict

    def other(values):
        config = read(values)
        return replace(config, diffusion=replace(config.diffusion, timesteps=1000))

    monkeypatch.setattr(checkpoint, "from_dict", other)


@fault("checkpoint", CHECKPOINT)
def prediction_and_variance_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoint.from_dict
    monkeypatch.setattr(checkpoint, "from_dict", lambda values: replace(read(values), diffusion=DiffusionConfig(30)))


@fault("checkpoint", TRAINER)
def resumed_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.engine.flat_weights._copy_all", lambda part, into, source: None)


@fault("checkpoint", STATE)
def moments_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    load = flat_weights._copy_all
    monkeypatch.setattr(flat_weights, "_copy_all", lambda part, *given: part == "optimizer" or load(part, *given))


@fault("checkpoint", RUN)
def a_run_that_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "load_state", lambda self, step, parts: setattr(self, "step", step))


@fault("order", RUN)
def a_run_in_the_order_of_seed_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.data.conditions.key_from_seed", lambda seed: key_from_seed(0))


@fault("order", RUN)
def a_run_that_holds_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.data.conditions.BatchSource", lambda *given: BatchSource(*given[:3]))


@fault("ema", MODEL)
def raw_weights_for_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = trained_model.unet_of
    monkeypatch.setattr(trained_model, "unet_of", lambda found, part: unet(found, "model"))


@fault("checkpoint", MODEL)
def average_for_the_raw_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = trained_model.unet_of
    monkeypatch.setattr(trained_model, "unet_of", lambda found, part: unet(found, "ema"))


@fault("ema", MODEL)
def sampler_of_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    table = trained_model.sampler_table
    monkeypatch.setattr(
        trained_model, "sampler_table", lambda diffusion, sampler: table(diffusion, replace(sampler, eta=0.0))
    )


@fault("ema", MODEL)
def first_index_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    images = trained_model.ImageRange
    monkeypatch.setattr(
        trained_model, "ImageRange", lambda seed, first, *rest, **asked: images(seed, 0, *rest, **asked)
    )


@fault("ema", TRAINER)
def average_never_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def lend(self):
        yield self.unet

    monkeypatch.setattr(Trainer, "ema_weights", lend)


@fault("ema", TRAINER)
def average_never_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def lend(self):
        for name, parameter in self.parameters.items():
            parameter.data = self.ema[name]
        yield self.unet

    monkeypatch.setattr(Trainer, "ema_weights", lend)


@fault("ema", PREVIEWS)
def previews_of_the_raw_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Previews.draw

    def raw(self, count):
        self.trainer.ema, average = {name: p.detach() for name, p in self.trainer.parameters.items()}, self.trainer.ema
        draw(self, count)
        self.trainer.ema = average

    monkeypatch.setattr(Previews, "draw", raw)


@fault("ema", PREVIEWS)
def previews_of_the_first_average(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Previews.draw
    monkeypatch.setattr(Previews, "draw", lambda self, count: None if self.loop else draw(self, count))


@pytest.mark.parametrize(("plant", "stage", "file"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS])
def test_a_planted_fault_is_named(monkeypatch, plant, stage, file):
    plant(monkeypatch)
    first = next(result for result in everything() if result.verdict is Verdict.WRONG)
    assert first.stage == stage
    assert file in first.file


def test_reversed_channels_are_told_as_such(monkeypatch):
    pixels_in_bgr(monkeypatch)
    assert next(iter(check_pictures(3))).found == "the channels in reverse order"
