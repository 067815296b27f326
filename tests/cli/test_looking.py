"""`ddpm-fast data`: what it says of a folder, the picture that it draws, and what it refuses."""

import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tyro")
from ddpm_fast.cli import looking
from ddpm_fast.cli import main as cli
from ddpm_fast.data import survey
from ddpm_fast.engine.speed import Machine
from ddpm_fast.planning import auto
from tests.cli.test_cli import refused, run


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let every machine be one of two cores, and pictures lie in a directory of the test's own."""
    monkeypatch.setattr(looking, "this_machine", lambda device, precision: Machine("cpu", 6e9, 1.5e11))
    monkeypatch.setattr(auto, "measured_speed", lambda kind, dtype: 1.5e11)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def zoo() -> Path:
    """Two classes of pictures in unlike modes and sizes, a copy, one that is on its side, and a broken file."""
    random, folder = np.random.default_rng(0), Path("zoo")
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    (folder / "dogs/copy.png").write_bytes((folder / "cats/1.png").read_bytes())
    Image.fromarray(random.integers(0, 256, (16, 40, 4), dtype=np.uint8)).save(folder / "dogs/ghost.png")
    turned = Image.Exif()
    turned[survey.EXIF_ORIENTATION] = 6
    Image.fromarray(random.integers(0, 256, (50, 90), dtype=np.uint8)).save(folder / "dogs/side.jpg", exif=turned)
    (folder / "cats/broken.png").write_bytes(b"no picture")
    return folder


def test_the_picture_is_not_put_among_those_that_it_shows(zoo, monkeypatch, capsys):
    monkeypatch.chdir(zoo)
    assert "--out data.png lies in ., and would be one of its images: name another" in refused("data .", capsys)
    assert not Path("data.png").exists()
    assert run("data . --out ../data.png", capsys)[0] == 0


def test_what_is_in_a_folder_is_said_and_drawn_and_nothing_else_is_written(zoo, tmp_path, capsys):
    status, out, _ = run("data zoo", capsys)
    assert status == 0
    for says in (
        "images      12 images, 30x20 at the median, in colour, some transparent",
        "sizes       width 30 to 50, 30 at the median; height 16 to 90, 20 at the median",
        "modes       RGB 9, RGBA 1, L 1",
        "classes     2: dogs 7, cats 4",
        "left out    1: cats/broken.png (not an image); train needs --skip-bad for that",
        "copies      1: dogs/copy.png is like cats/1.png",
        "--image-channels 4 learns transparency, too",
        "11 of them as the network would see them: data.png",
    ):
        assert says in out
    with Image.open("data.png") as picture:
        assert picture.info["Software"] == "ddpm-fast data"
    (line,) = [line for line in out.splitlines() if line.startswith("ddpm-fast train")]
    config = cli.parse_train(shlex.split(line)[2:]).config
    assert (config.data.skip_bad, config.unet.height, config.unet.image_channels) == (True, 8, 3)
    assert {entry.name for entry in tmp_path.iterdir()} == {"zoo", "data.png"}
    before = Path("data.png").read_bytes()
    assert run("data zoo --height 16", capsys)[0] == 0  # its own is replaced
    assert Path("data.png").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("data", "PATH is missing: name a folder of images"),
        ("data nowhere", "nowhere does not exist"),
        ("data empty", "holds no image"),
        ("data zoo --out mine.png", "--out mine.png is there, and was not written by ddpm-fast data: name another"),
        ("data zoo --out text.png", "--out text.png is there, and was not written by ddpm-fast data"),
        ("data zoo --out sheet.jpg", "let it end in .png"),
        ("data zoo --height 7 --minutes -1", "--minutes is -1"),
        ("data zoo --image-channels 5", "--image-channels is 5: images have 1 (grey)"),
        ("data zoo --out zoo/cats/0.png/x.png", "lies in zoo, and would be one of its images"),
        ("data zoo --hieght 8", "Did you mean '--height'?"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(zoo, arguments, says, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (3, 3)).save("mine.png")
    Path("text.png").write_text("mine")
    assert says in refused(arguments, capsys)
    assert {entry.name for entry in tmp_path.iterdir()} == {"zoo", "empty", "mine.png", "text.png"}
    assert Path("text.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("pixels", "grey", "transparent"),
    [
        (np.zeros((3, 9, 9), np.uint8), True, False),
        (np.full((3, 9, 9, 3), 77, np.uint8), True, False),
        (np.full((3, 9, 9, 4), 255, np.uint8), True, False),
        (np.full((3, 9, 9, 4), 254, np.uint8), True, True),
        (np.arange(3 * 9 * 9 * 3, dtype=np.uint8).reshape(3, 9, 9, 3) * 40, False, False),
    ],
)
def test_colour_and_transparency_are_seen_in_the_pixels(pixels, grey, transparent):
    np.save("images.npy", pixels)
    found = survey.survey(looking.DataConfig("images.npy"))
    assert (found.count, found.side, found.grey, found.transparent) == (3, 9, grey, transparent)


def test_a_grey_jpeg_in_colours_of_its_own_is_grey_and_one_coloured_file_of_many_is_found():
    Path("photos").mkdir()
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 30), dtype=np.uint8)
        Image.fromarray(pixels).convert("RGB").save(f"photos/{number}.jpg")
    assert survey.survey(looking.DataConfig("photos")).grey
    Image.new("RGB", (30, 40), (200, 10, 10)).save("photos/9.jpg")
    assert not survey.survey(looking.DataConfig("photos")).grey


def test_pictures_in_a_tar_are_looked_at_and_named_too(zoo, capsys):
    with tarfile.open("zoo.tar", "w") as archive:
        archive.add(zoo / "cats", "cats")
    found = survey.survey(looking.DataConfig("zoo.tar"))
    assert (found.count, found.side, found.modes) == (5, 20, (("RGB", 4),))
    status, out, _ = run("data zoo.tar", capsys)
    assert status == 0
    assert "cats/broken.png" in out


def test_a_large_folder_is_looked_at_in_part(monkeypatch):
    Path("many").mkdir()
    for number in range(12):
        Image.new("L", (10 + number, 10)).save(f"many/{number:02}.png")
    monkeypatch.setattr(survey, "SIZED", 3)
    found = survey.survey(looking.DataConfig("many"))
    assert (found.count, found.widths, sum(count for _, count in found.modes)) == (12, (10, 14, 18), 3)
    assert survey.survey(looking.DataConfig("many"), all_sizes=True).widths == (10, 16, 21)
    assert found.heights == (10, 10, 10)
