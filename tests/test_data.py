"""Images in: every mode, every broken file, the cache, and the order of examples."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_fast import data, pictures
from ddpm_fast.config import DataConfig, InputError, UNetConfig
from ddpm_fast.data import BatchSource, ExampleOrder, open_dataset
from ddpm_fast.noise import key_from_seed
from ddpm_fast.pictures import fit

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


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_formats_are_read_recursively(tmp_path, suffix):
    (tmp_path / "deep/er").mkdir(parents=True)
    plain((200, 30, 90)).save(tmp_path / f"deep/er/a.{suffix}")
    (tmp_path / "notes.txt").write_text("not an image, and not named like one")
    images = opened(tmp_path).images
    assert images.shape == (1, 4, 6, 3)
    assert np.abs(images.astype(int) - [200, 30, 90]).max() <= 8  # JPEG, WebP and GIF are lossy


@pytest.mark.parametrize(
    ("image", "grey", "rgb"),
    [
        (plain(77, "L"), 77, (77, 77, 77)),
        (plain((255, 0, 0)), 76, (255, 0, 0)),  # ITU-R 601: 0.299 R
        (plain((0, 0, 0, 0), "RGBA"), 255, (255, 255, 255)),  # transparent: laid over white
        (plain((0, 0, 0, 128), "RGBA"), 127, (127, 127, 127)),
        (plain((10, 255), "LA"), 10, (10, 10, 10)),
        (plain(1, "1"), 255, (255, 255, 255)),
        (plain((0, 255, 255, 0), "CMYK"), 76, (255, 0, 0)),
        (Image.fromarray(np.full((4, 6), 0x8080, dtype=np.uint16)), 128, (128, 128, 128)),
        (Image.fromarray(np.full((4, 6), 0.5, dtype=np.float32)), 128, (128, 128, 128)),
        (plain((255, 0, 0)).quantize(2), 76, (255, 0, 0)),
    ],
    ids=["L", "RGB", "transparent", "half", "LA", "1", "CMYK", "16 bits", "float", "palette"],
)
def test_modes_are_converted_by_the_stated_rule(image, grey, rgb):
    assert np.abs(fit(image, (4, 6, 1)).astype(int) - grey).max() <= 1
    assert np.abs(fit(image, (4, 6, 3)).astype(int) - rgb).max() <= 1
    assert fit(image, (4, 6, 4)).shape == (4, 6, 4)
    assert fit(image, (4, 6, 2)).shape == (4, 6, 2)


def test_alpha_is_kept_where_it_is_asked_for():
    assert fit(plain((1, 2, 3, 4), "RGBA"), (4, 6, 4))[0, 0].tolist() == [1, 2, 3, 4]


def test_exif_orientation_is_honoured(tmp_path):
    image = plain("black", "RGB", (4, 6))
    image.paste("white", (0, 0, 4, 1))  # a white top row, stored sideways
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    upright = opened(tmp_path).images[0]
    assert upright[:, -1].min() == 255
    assert upright[:, :-1].max() == 0


def test_wide_images_are_centre_cropped():
    image = plain("black", "L", (18, 4))
    image.paste(255, (6, 0, 12, 4))
    assert fit(image, (4, 6, 1)).min() == 255


def test_images_are_resized_with_antialiasing():
    checkers = np.indices((400, 600)).sum(0) % 2 * 255
    assert np.abs(fit(Image.fromarray(checkers.astype(np.uint8)), (4, 6, 1)).astype(int) - 127).max() <= 2


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


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    plain("white", "L", (40, 40)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb.png .*decompression bomb"):
        opened(tmp_path)


def test_an_empty_folder_or_a_missing_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no image"):
        opened(tmp_path)
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
    store.write_bytes(store.read_bytes()[:100])
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


@pytest.mark.parametrize("count", [1, 3, 10])
def test_every_epoch_visits_every_image_once_however_it_is_split(count):
    order = ExampleOrder(key_from_seed(5), count)
    whole = order.indices(0, 4 * count)
    epochs = whole.view(4, count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    if count == 10:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    fresh = ExampleOrder(key_from_seed(5), count)
    split = torch.cat([fresh.indices(i, min(7, 4 * count - i)) for i in range(0, 4 * count, 7)])
    assert torch.equal(whole, split)
    assert torch.equal(ExampleOrder(key_from_seed(5), count).indices(2 * count, count), epochs[2])


def test_a_batch_is_a_channels_last_view_of_the_store():
    images = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
    images.flags.writeable = False
    source = BatchSource(data.Dataset(images, "", ""), key_from_seed(0), torch.device("cpu"))
    batch, numbers = source.batch(3, 4)
    assert batch.shape == (4, 3, 4, 6)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert numbers.tolist() == [3, 4, 5, 6]
    rows = source.order.indices(3, 4)
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), images[rows.numpy()])


def test_what_is_a_picture():
    names = ("a.png", "a.JPG", "a.webp", "a.txt", "a")
    assert [pictures.is_picture(Path(name)) for name in names] == [True, True, True, False, False]
