"""Arrays in: their shapes, dtypes and ranges, and files that are none."""

from pathlib import Path

import numpy as np
import pytest

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.errors import InputError

RGB = UNetConfig(3, 4, 6, channels=32, channel_multipliers=(1,), attention_resolutions=())
GREY = UNetConfig(1, 4, 6, channels=32, channel_multipliers=(1,), attention_resolutions=())


def opened(path: Path, unet: UNetConfig = RGB, **options) -> Dataset:
    return open_dataset(DataConfig(data=str(path), **options), unet)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_of_uint8(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    path = tmp_path / f"images{suffix}"
    (np.savez if suffix == ".npz" else np.save)(path, images)
    assert np.array_equal(opened(path).images, images)
    assert opened(path, GREY).images.shape == (5, 4, 6, 1)


@pytest.mark.parametrize(("float_range", "low"), [("0..1", 0.0), ("-1..1", -1.0)])
def test_arrays_of_floats(tmp_path, float_range, low):
    values = np.linspace(low, 1, 24, dtype=np.float32).reshape(1, 4, 6)
    np.save(tmp_path / "a.npy", values)
    images = opened(tmp_path / "a.npy", GREY, float_range=float_range).images
    assert np.abs(images[..., 0] - (values - low) / (1 - low) * 255).max() <= 0.51


@pytest.mark.parametrize(
    ("array", "float_range", "says"),
    [
        (np.zeros((2, 4, 6), np.float32), "none", r"floats in \[0, 0\].*--float-range"),
        (np.full((2, 4, 6), 1.5, np.float32), "0..1", r"spans \[1.5, 1.5\]"),
        (np.full((2, 4, 6), -0.5), "0..1", r"spans \[-0.5, -0.5\]"),
        (np.full((2, 4, 6), np.nan), "0..1", r"nan at \(0, 0, 0, 0\)"),
        (np.zeros((2, 4, 6), np.uint8), "0..1", "is uint8"),
        (np.zeros((2, 4, 6), np.int32), "none", "int32"),
        (np.zeros((4, 6), np.uint8), "none", r"shape \(4, 6\)"),
        (np.zeros((0, 4, 6), np.uint8), "none", "shape"),
        (np.zeros((1, 3, 4, 6), np.uint8), "none", "shape"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, array, float_range, says):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=says):
        opened(tmp_path / "a.npy", GREY, float_range=float_range)


def test_files_that_are_no_arrays(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="pickled"):
        opened(tmp_path / "objects.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(InputError, match=r"a, b"):
        opened(tmp_path / "two.npz")
    for name in ("empty.npy", "empty.npz", "text.npz"):
        (tmp_path / name).write_bytes(b"hello" if "text" in name else b"")
        with pytest.raises(InputError, match=name):
            opened(tmp_path / name)
    (tmp_path / "table.csv").write_text("1")
    with pytest.raises(InputError, match="is a file of another kind"):
        opened(tmp_path / "table.csv")
