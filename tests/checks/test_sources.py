"""Pixels that differ from those of the files that --data names are told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.checks.sources import check_sources
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.data import image_files
from ddpm_fast.data.dataset import open_dataset

CPU = torch.device("cpu")
UNET = UNetConfig(3, 6, 10, 4, (1,), res_blocks=1, attention_resolutions=(), groups=2)
CONFIG = Config("digits", UNET, DiffusionConfig(50, "cosine"), DataConfig(flip=True), TrainingConfig(batch_size=16))
PIXELS = np.random.default_rng(0).integers(0, 256, (150, 6, 10, 3), dtype=np.uint8)
NOISE, OPS, BATCHES = "diffusion/noise.py", "ops/reference.py", "data/batches.py"
TRAINER, LOOP, MODEL = "engine/trainer.py", "engine/sampling.py", "model/unet.py"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures of every plain kind, larger than the network's images."""
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    kinds = [Image.fromarray(pixels), Image.fromarray(pixels[..., :3]), Image.fromarray(pixels[..., 0])]
    kinds += [kinds[0].convert("LA"), kinds[1].convert("CMYK")]
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned upright
    for number, image in enumerate(kinds):
        image = image.resize((40, 31 + number), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"{number}.tif", exif=turned if number == 1 else Image.Exif())
    grey = np.kron(pixels[..., 0].astype(np.uint16) * 257, np.ones((4, 5), np.uint16))
    Image.fromarray(grey).save(tmp_path / "16-bit.png")
    (tmp_path / "broken (1).png").write_bytes(b"no picture")
    return tmp_path


def sources(data: str, unet_config: UNetConfig = UNET, **options: Any) -> list[CheckResult]:
    config = replace(CONFIG, unet=unet_config, data=DataConfig(data=data, **options))
    return list(check_sources(config, open_dataset(config.data, unet_config), full=True))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pixels_of_files_pass(pictures, channels):
    results = sources(str(pictures), replace(UNET, image_channels=channels), skip_bad=True)
    assert [result for result in results if not result.passed] == []
    assert results[-1].expected.startswith("6 images")


def bgr(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = image_files.fit
    monkeypatch.setattr("ddpm_fast.data.pictures.fit", lambda *given: fit(*given)[..., ::-1])


def stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files.ImageOps, "fit", lambda image, size, *rest: image.resize(size, *rest))


def not_turned_upright(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ddpm_fast.data.image_files.ImageOps.exif_transpose", lambda image, **options: None if options else image
    )


def dark(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = image_files.fit
    monkeypatch.setattr("ddpm_fast.data.pictures.fit", lambda *given: fit(*given) // 2)


def transparency_over_black(monkeypatch: pytest.MonkeyPatch) -> None:
    new = Image.new
    monkeypatch.setattr(image_files.Image, "new", lambda mode, size, color: new(mode, size, "black"))


@pytest.mark.parametrize("plant", [bgr, stretched, dark, transparency_over_black, not_turned_upright])
def test_other_pixels_than_the_files_are_named(monkeypatch, pictures, plant):
    config = replace(CONFIG, data=DataConfig(data=str(pictures), skip_bad=True))
    with monkeypatch.context() as patch:
        plant(patch)
        dataset = open_dataset(config.data, UNET)
    wrong = [result for result in check_sources(config, dataset, full=True) if not result.passed]
    assert [(result.stage, result.verdict) for result in wrong] == [("data", Verdict.WRONG)]
    assert "data/image_files.py" in wrong[0].file


def test_missing_images_are_named(pictures):
    config = replace(CONFIG, data=DataConfig(data=str(pictures), skip_bad=True))
    dataset = open_dataset(config.data, UNET)
    wrong = [r for r in check_sources(config, replace(dataset, images=dataset.images[:3])) if not r.passed]
    assert "every usable image of the data is there" in [result.name for result in wrong]


@pytest.mark.parametrize(("kind", "float_range"), [("uint8", "none"), ("float32", "0..1"), ("float64", "-1..1")])
def test_pixels_of_arrays_pass(tmp_path, kind, float_range):
    array = PIXELS if kind == "uint8" else (PIXELS / 255).astype(kind)
    file = tmp_path / "images.npy"
    np.save(file, array * 2 - 1 if float_range == "-1..1" else array)
    results = sources(str(file), float_range=float_range)
    assert [result for result in results if not result.passed] == []
    assert results[-1].expected.startswith("24 images")


def test_digits_pass_and_images_of_another_shape_are_named():
    digits = UNetConfig(1, 8, 8, 4, (1,), 1, (), groups=2)
    assert all(result.passed for result in sources("digits", digits))
    config = replace(CONFIG, data=DataConfig(data="digits"))
    wrong = list(check_sources(config, open_dataset(config.data, digits)))
    assert [(result.stage, result.passed) for result in wrong] == [("data", False)]
