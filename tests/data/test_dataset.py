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

pytest.importorskip("sklearn")
from sklearn.datasets import load_digits

from ddpm_fast.config import DataConfig, UNetConfig
from ddpm_fast.data import dataset as data
from ddpm_fast.data import pictures, store
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.data.image_files import fit
from ddpm_fast.errors import InputError
from ddpm_fast.files import cache_directory

RGB = UNetConfig(3, 4, 6, channels=32, channel_multipliers=(1,), attention_resolutions=())


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


@pytest.mark.parametrize(("size", "read"), [((400, 300), (50, 38)), ((75, 100), (38, 50)), ((71, 71), (71, 71))])
def test_a_large_jpeg_is_read_at_a_scale_of_twice_what_it_becomes(tmp_path, monkeypatch, size, read):
    gradient = np.linspace(0, 255, size[0]).astype(np.uint8)
    picture = Image.fromarray(np.tile(gradient[None, :, None], (size[1], 1, 3)))
    picture.save(tmp_path / "a.jpg", quality=95)
    sizes = []
    monkeypatch.setattr(pictures, "fit", lambda image, shape: sizes.append(image.size) or fit(image, shape))
    found = opened(tmp_path, replace(RGB, height=18, width=12)).images[0]
    assert sizes == [read]
    assert np.abs(found.astype(int) - fit(picture, (18, 12, 3))).mean() < 2  # a tenth of a pixel of this gradient


def test_what_archivers_and_file_managers_leave_is_no_image(tmp_path):
    for name in ("a.png", "__MACOSX/._a.png", ".hidden.png", "deep/.thumbnails/b.png", ".git/c.png", "deep/._d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        plain((1, 2, 3)).save(tmp_path / name)
    (tmp_path / "Thumbs.db").write_bytes(b"")
    assert len(opened(tmp_path)) == 1
    (tmp_path / "a.png").rename(tmp_path / ".a.png")
    with pytest.raises(InputError, match="holds no image"):
        opened(tmp_path)
    assert len(opened(tmp_path / ".git")) == 1  # named itself, it is meant


def test_the_grids_of_a_run_that_lies_in_its_data_are_no_images(tmp_path):
    plain((1, 2, 3)).save(tmp_path / "a.png")
    before = opened(tmp_path).fingerprint
    samples = tmp_path / "runs/mine/samples"
    for folder in (samples, samples.with_name("checkpoints")):
        folder.mkdir(parents=True)
    plain((4, 5, 6)).save(samples / "data.png")
    assert len(opened(tmp_path)) == 2  # without its configuration it is any folder
    (samples.parent / "config.json").write_text("{}")
    assert opened(tmp_path).fingerprint == before
    assert len(opened(samples.parent)) == len(opened(samples)) == 1  # named itself, it is meant


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
    assert list(cache_directory().iterdir()) == []


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
    monkeypatch.setattr(pictures, "fit", stumble)
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

    def no_more(path: Path, shape: object) -> Image.Image:
        raise AssertionError(f"decoded {path} again")

    monkeypatch.setattr(pictures, "decode", no_more)
    second = opened(tmp_path)
    assert isinstance(second.images, np.memmap)
    assert np.array_equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint


def test_changed_content_and_a_torn_store_are_decoded_again(tmp_path):
    plain((1, 2, 3)).save(tmp_path / "a.png")
    first = opened(tmp_path)
    file = cache_directory() / f"{first.fingerprint}.npy"
    archive = io.BytesIO()
    np.savez(archive, np.zeros(3))
    for damaged in (file.read_bytes()[:100], b"", b"PK\x03\x04", archive.getvalue()):
        file.write_bytes(damaged)
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
    assert list(cache_directory().iterdir()) == []


def test_a_store_owns_its_space_before_it_is_filled():
    """In a sparse file a full disk would be a SIGBUS, which nothing catches."""
    allocated: list[int] = []

    def fill(images: np.ndarray) -> None:
        allocated.extend(512 * entry.stat().st_blocks for entry in cache_directory().iterdir())

    store.build("key", 1000, (32, 32, 3), fill)
    assert allocated[0] >= 1000 * 32 * 32 * 3


@pytest.mark.parametrize("column", ["image_column", "label_column"])
def test_columns_of_what_has_none_are_refused(tmp_path, column):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8)).save(tmp_path / "images/a.png")
    np.save(tmp_path / "a.npy", np.zeros((1, 4, 6, 3), dtype=np.uint8))
    for name in (str(tmp_path / "images"), str(tmp_path / "a.npy"), "digits"):
        with pytest.raises(InputError, match=f"--{column.replace('_', '-')} x is for .parquet and .tar files: --data"):
            open_dataset(replace(DataConfig(data=name), **{column: "x"}), RGB)
