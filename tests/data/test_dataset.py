"""Images in: every mode, every broken file, and the cache."""

import io
import os
import resource
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data import dataset as data
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.errors import InputError

RGB = UNetConfig(3, 4, 6, channels=32, channel_multipliers=(1,), attention_resolutions=())
GREY = replace(RGB, image_channels=1)


def opened(path: Path, unet: UNetConfig = RGB, **options) -> data.Dataset:
    return open_dataset(DataConfig(data=str(path), **options), unet)


def plain(color, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new(mode, size, color)


def test_digits_are_scikit_learns():
    digits = open_dataset(DataConfig(data="digits"), UNetConfig(1, 8, 8, 32, (1,), attention_resolutions=()))
    assert digits.images.shape == (1797, 8, 8, 1)
    pixels, _ = load_digits(return_X_y=True)
    assert np.abs(digits.images.reshape(1797, 64) - pixels * 255 / 16).max() <= 0.5
    assert (int(digits.images.min()), int(digits.images.max())) == (0, 255)


@pytest.mark.parametrize(
    ("side", "fingerprint"),
    [(8, "6e0e1a01ad71f148f515205927d2f2c46f12477f"), (16, "53832a34cee57e42239b7725c3aa035c90c96fb3")],
)
def test_runs_on_digits_of_earlier_versions_find_the_same_data(side, fingerprint):
    """What earlier versions wrote into a run's config.json: another would forbid to continue it."""
    unet = UNetConfig(1, side, side, 32, (1,), attention_resolutions=())
    assert open_dataset(DataConfig(data="digits"), unet).fingerprint == fingerprint


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_formats_are_read_recursively(tmp_path, suffix):
    (tmp_path / "deep/er").mkdir(parents=True)
    plain((200, 30, 90)).save(tmp_path / f"deep/er/a.{suffix}")
    (tmp_path / "notes.txt").write_text("not an image, and not named like one")
    images = opened(tmp_path).images
    assert images.shape == (1, 4, 6, 3)
    assert np.abs(images.astype(int) - [200, 30, 90]).max() <= 8  # JPEG, WebP and GIF are lossy


def test_exif_orientation_is_honoured(tmp_path):
    image = plain("black", "RGB", (4, 6))
    image.paste("white", (0, 0, 4, 1))  # a white top row, stored sideways
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    upright = opened(tmp_path).images[0]
    assert upright[:, -1].min() == 255
    assert upright[:, :-1].max() == 0


def broken_folder(tmp_path: Path) -> Path:
    plain((1, 2, 3)).save(tmp_path / "good.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    return tmp_path


def test_every_unusable_file_is_named_before_step_0(tmp_path):
    with pytest.raises(InputError) as refused:
        opened(broken_folder(tmp_path))
    message = str(refused.value)
    assert "3 of 4" in message
    for part in ("cut.jpg (", "empty.png (zero bytes)", "text.png (not an image)", "--skip-bad"):
        assert part in message
    assert "\n" not in message


def test_skip_bad_leaves_them_out_and_counts_them(tmp_path):
    folder = broken_folder(tmp_path)
    for _ in range(2):  # decoded, then from the cache
        dataset = opened(folder, skip_bad=True)
        assert len(dataset) == 1
        assert len(dataset.skipped) == 3
    with pytest.raises(InputError, match="3 of 4"):
        opened(folder)


def test_what_is_kept_moves_up_and_stays_in_order(tmp_path):
    for i, name in enumerate("abcdef"):
        plain((10 * i, 0, 0)).save(tmp_path / f"{name}.png")
    for name in "ad":
        (tmp_path / f"{name}.png").write_bytes(b"")
    for _ in range(2):  # decoded, then from the cache
        assert opened(tmp_path, skip_bad=True).images[:, 0, 0, 0].tolist() == [10, 20, 40, 50]


def test_a_refused_folder_leaves_nothing_in_the_cache(tmp_path):
    with pytest.raises(InputError):
        opened(broken_folder(tmp_path))
    assert list(data.cache_directory().iterdir()) == []


@pytest.mark.parametrize("name", [b"line\nbreak.png", b"\xff not text.png"])
def test_any_file_name_is_named_in_one_line_of_text(tmp_path, name):
    plain((1, 2, 3)).save(tmp_path / "good.png")
    (tmp_path / os.fsdecode(name)).write_bytes(b"")
    (line,) = opened(tmp_path, skip_bad=True).skipped
    assert line.isprintable()
    assert line.endswith(".png (zero bytes)")


@pytest.mark.parametrize("side", [40, 50])  # over the limit, where Pillow only warns; over twice the limit
def test_a_decompression_bomb_is_refused_whatever_the_other_threads_do(tmp_path, monkeypatch, side):
    for i in range(60):
        plain(i, "L", (side, side)).save(tmp_path / f"{i:02}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    interval, filters = sys.getswitchinterval(), list(warnings.filters)
    sys.setswitchinterval(1e-6)
    try:
        with pytest.raises(InputError, match=r"60 of 60 .*00.png .*decompression bomb.* and 55 more"):
            opened(tmp_path)
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == filters


def test_a_decoder_that_stumbles_costs_one_file(tmp_path, monkeypatch):
    def stumble(image, shape):
        raise NotImplementedError("pixel format 11")  # as Pillow's DDS decoder does on a damaged file

    plain((1, 2, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(data, "fit", stumble)
    with pytest.raises(InputError, match=r"a.png \(NotImplementedError: pixel format 11\)"):
        opened(tmp_path)


def test_an_empty_folder_or_a_missing_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no image"):
        opened(tmp_path)
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError, match=r"cannot be read: File name too long|does not exist"):
            opened(Path(name))
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="Did you mean 'images'"):
        opened(tmp_path / "image")
    (tmp_path / "images/bad.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 1 .*none is left"):
        opened(tmp_path / "images", skip_bad=True)


def test_a_second_run_decodes_nothing(tmp_path, monkeypatch):
    plain((1, 2, 3)).save(tmp_path / "a.png")
    first = opened(tmp_path)

    def no_more(path: Path) -> Image.Image:
        raise AssertionError(f"decoded {path} again")

    monkeypatch.setattr(data, "decode", no_more)
    second = opened(tmp_path)
    assert isinstance(second.images, np.memmap)
    assert np.array_equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint


def test_changed_content_and_a_torn_store_are_decoded_again(tmp_path):
    plain((1, 2, 3)).save(tmp_path / "a.png")
    first = opened(tmp_path)
    store = data.cache_directory() / f"{first.fingerprint}.npy"
    archive = io.BytesIO()
    np.savez(archive, np.zeros(3))
    for damaged in (store.read_bytes()[:100], b"", b"PK\x03\x04", archive.getvalue()):
        store.write_bytes(damaged)
        assert opened(tmp_path).images[0, 0, 0].tolist() == [1, 2, 3]
    plain((9, 8, 7)).save(tmp_path / "a.png")
    second = opened(tmp_path)
    assert second.images[0, 0, 0].tolist() == [9, 8, 7]
    assert second.fingerprint != first.fingerprint


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    plain((1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot write"):
        opened(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    plain((1, 2, 3)).save(tmp_path / "a.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))  # EFBIG, as ENOSPC
    try:
        with pytest.raises(InputError, match=r"cannot write .*free some space"):
            opened(tmp_path, replace(RGB, height=256, width=256))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(data.cache_directory().iterdir()) == []


def test_a_store_owns_its_space_before_it_is_filled():
    """In a sparse file a full disk would be a SIGBUS, which nothing catches."""
    allocated: list[int] = []

    def fill(store: np.ndarray) -> None:
        allocated.extend(512 * entry.stat().st_blocks for entry in data.cache_directory().iterdir())

    data._build("key", 1000, (32, 32, 3), fill)
    assert allocated[0] >= 1000 * 32 * 32 * 3


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
    with pytest.raises(InputError, match="neither"):
        opened(tmp_path / "table.csv")
