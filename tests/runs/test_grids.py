"""Pictures in by the stated rule, samples out: pixels by hand, grids at known places, files whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import image_files as pictures
from ddpm_fast.data.image_files import fit
from ddpm_fast.errors import InputError
from ddpm_fast.runs import grids as images


def plain(color, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new(mode, size, color)


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


def test_wide_images_are_centre_cropped():
    image = plain("black", "L", (18, 4))
    image.paste(255, (6, 0, 12, 4))
    assert fit(image, (4, 6, 1)).min() == 255


def test_images_are_resized_with_antialiasing():
    checkers = np.indices((400, 600)).sum(0) % 2 * 255
    assert np.abs(fit(Image.fromarray(checkers.astype(np.uint8)), (4, 6, 1)).astype(int) - 127).max() <= 2


def test_what_is_a_picture():
    names = ("a.png", "a.JPG", "a.webp", "a.txt", "a")
    assert [pictures.is_picture(Path(name)) for name in names] == [True, True, True, False, False]


def test_normalized_maps_minus_one_to_black_and_one_to_white():
    samples = torch.tensor([-1.0, -0.5, 0.0, 1.0, 3.0, -9.0]).view(1, 1, 2, 3)
    assert images.to_uint8(samples).ravel().tolist() == [0, 64, 128, 255, 255, 0]


def test_pixels_are_channels_last():
    samples = torch.rand(2, 3, 4, 5) * 2 - 1
    expected = np.rint((samples.permute(0, 2, 3, 1).numpy() + 1) * 127.5)
    assert np.abs(images.to_uint8(samples) - expected).max() <= 1
    assert images.to_uint8(samples).shape == (2, 4, 5, 3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_a_saved_image_has_the_models_resolution_and_mode(tmp_path, channels, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    images.save_image(tmp_path / "a.png", pixels)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.mode, image.size) == (mode, (7, 5))
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (5, 3, 2), (9, 3, 3), (64, 8, 8)])
def test_a_grid_shows_every_image_at_its_place(count, columns, rows):
    pixels = np.zeros((count, 8, 8, 1), dtype=np.uint8) + np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    laid_out = np.asarray(images.grid(pixels))
    factor = laid_out.shape[0] // (rows * 10 + 2)
    assert laid_out.shape == ((rows * 10 + 2) * factor, (columns * 10 + 2) * factor)
    assert factor > 1
    for number in range(count):
        y, x = (2 + part * 10 + 4 for part in divmod(number, columns))
        assert laid_out[y * factor, x * factor] == number


def test_large_images_are_not_enlarged():
    assert images.grid(np.zeros((4, 256, 256, 3), dtype=np.uint8)).size == (2 * 258 + 2, 2 * 258 + 2)


def test_a_caption_is_never_cut_off():
    text = "a caption that is much longer than the picture is wide, and then some"
    picture = images.captioned(Image.new("L", (20, 20)), text)
    assert picture.width > 300
    last = np.asarray(picture.convert("L"))[20:, -6:]
    assert last.min() == 255  # the margin after the last letter stays white


def test_both_grids_are_written_and_drift_shows(tmp_path):
    samples = torch.linspace(-3, 3, 64).view(1, 1, 8, 8)
    normalized, raw = images.save_normalized_and_raw(samples, tmp_path, "step-0000005")
    assert (normalized.name, raw.name) == ("step-0000005_normalized.png", "step-0000005_raw.png")

    def levels(path) -> int:
        with Image.open(path) as image:
            return len(np.unique(np.asarray(image.convert("L"))[: 12 * 7]))

    assert levels(raw) > 2 * levels(normalized)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_constant_and_broken_samples_are_drawn(tmp_path, value):
    for path in images.save_normalized_and_raw(torch.full((2, 3, 4, 4), value), tmp_path, "a"):
        with Image.open(path) as image:
            image.load()


def test_an_animation_has_all_frames(tmp_path):
    frames = [np.full((4, 8, 8, 1), 60 * i, dtype=np.uint8) for i in range(4)]
    images.save_animation(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as image:
        assert getattr(image, "n_frames", 1) == 4


def test_a_picture_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        images.save_image(tmp_path / "file" / "a.png", np.zeros((2, 2, 1), dtype=np.uint8))


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no images"):
        images.grid(np.zeros((0, 8, 8, 1), dtype=np.uint8))
