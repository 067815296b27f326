"""The contact sheet shows, pixel by pixel, the examples that a run is trained on."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from ddpm_fast.config import Config, DataConfig, TrainingConfig, UNetConfig
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.runs.grids import GAP
from ddpm_fast.runs.sheet import contact_sheet, first_examples, write_sheet

UNET = UNetConfig(3, 16, 16, 8, (1,), attention_resolutions=(), groups=4)
CONFIG = Config(unet=UNET, data=DataConfig(flip=True), training=TrainingConfig(seed=3))


def images(count: int) -> Dataset:
    """Return images that each are of one colour, which no other is."""
    colours = np.stack([np.arange(count), np.arange(count) % 7 * 30, np.arange(count) // 7], axis=-1).astype(np.uint8)
    return Dataset(np.broadcast_to(colours[:, None, None], (count, 16, 16, 3)).copy(), "", "")


def test_the_sheet_shows_what_is_trained_on_once_and_nothing_that_is_held_out(tmp_path):
    held = replace(CONFIG, data=DataConfig(holdout=0.5))
    shown = first_examples(held, images(40))
    assert shown.shape == (20, 3, 16, 16)
    assert len(set(shown[:, 0, 0, 0].tolist())) == 20
    assert first_examples(CONFIG, images(200)).shape == (64, 3, 16, 16)

    write_sheet(tmp_path, held, images(40))
    with Image.open(tmp_path / "samples/data.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    factor = 4  # 16 pixels become 64
    rows = torch.arange(20) // 5
    for number, (row, column) in enumerate(zip(rows.tolist(), (torch.arange(20) % 5).tolist(), strict=True)):
        top, left = ((GAP + place * (16 + GAP)) * factor + 8 for place in (row, column))
        left += (pixels.shape[1] - (5 * (16 + GAP) + GAP) * factor) // 2  # the caption may be wider
        assert pixels[top, left].tolist() == shown[number, :, 0, 0].tolist()


def test_equal_runs_have_equal_bytes_and_what_is_there_stays(tmp_path):
    for name in ("a", "b"):
        write_sheet(tmp_path / name, CONFIG, images(200))
    one, other = ((tmp_path / name / "samples/data.png").read_bytes() for name in ("a", "b"))
    assert one == other
    write_sheet(tmp_path / "a", replace(CONFIG, training=TrainingConfig(seed=4)), images(200))
    assert (tmp_path / "a/samples/data.png").read_bytes() == one
    assert (
        contact_sheet(replace(CONFIG, training=TrainingConfig(seed=4)), images(200)).tobytes()
        != contact_sheet(CONFIG, images(200)).tobytes()
    )
