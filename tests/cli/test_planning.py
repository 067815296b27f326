"""`--preset auto` as a user meets it: a folder without a preset is planned, said, stored, and never planned anew."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tyro")
from ddpm_fast.cli import main as cli
from ddpm_fast.config import Config
from ddpm_fast.engine import speed
from ddpm_fast.engine.speed import Machine
from ddpm_fast.planning import auto
from ddpm_fast.runs.directory import read_config
from tests.cli.test_cli import refused, run

TWO_CORES = 1.5e11
TINY = "--channels 8 --channel-multipliers 1 --steps 2 --batch-size 4 --sample-every 0 --timesteps 25"


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let every machine be one of two cores, and runs/ lie in a directory of the test's own."""
    monkeypatch.setattr(auto, "this_machine", lambda device, precision: Machine("cpu", 6e9, TWO_CORES))
    monkeypatch.setattr(auto, "measured_speed", lambda kind, dtype: TWO_CORES)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """A folder of 40 small pictures in colour, whose name needs quotes."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 12, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return str(folder)


def command_in(out: str) -> list[str]:
    """Return the arguments of the one command that was said, as a shell splits it."""
    (line,) = [line for line in out.splitlines() if line.startswith("ddpm-fast train ")]
    return shlex.split(line)[1:]


def planned(arguments: list[str]) -> Config:
    return cli.parse_train(arguments[1:]).config


def test_a_folder_without_a_preset_is_planned_trained_and_never_planned_anew(photos, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--data", photos, *TINY.split()])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "my photos: 40 images, 12x9, in colour" in out
    assert "of training here" in out
    found = read_config(tmp_path / "runs/auto-1")
    assert found is not None
    config = found[0]
    assert (config.preset, config.training.steps, config.training.batch_size) == ("auto", 2, 4)
    assert (config.unet.image_channels, config.unet.height, config.unet.width) == (3, 8, 8)
    assert planned(command_in(out)) == config

    def plan_again(*arguments, **keywords):
        raise AssertionError("planned anew")

    monkeypatch.setattr("ddpm_fast.planning.auto.planned", plan_again)
    status, out, _ = run("train --out runs/auto-1 --resume --steps 3", capsys)
    assert status == 0
    assert "of training here" not in out
    assert "--preset auto -> digits" in refused("train --out runs/auto-1 --resume --preset digits --steps 4", capsys)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        pytest.param("--minutes 5", marks=pytest.mark.slow),
        pytest.param("--height 16 --channels 20 --flip", marks=pytest.mark.slow),
        "--preset auto --image-channels 4 --learning-rate 1e-3 --seed 7 --no-compile",
        "--channel-multipliers 1 --attention-resolutions --accept ema loss",
    ],
)
def test_the_line_that_is_said_gives_the_same_plan_on_any_machine(flags, monkeypatch, capsys):
    images = np.zeros((2000, 48, 48, 3), dtype=np.uint8)
    images[..., 0] = 200
    np.save("my photos.npy", images)
    arguments = ["train", "--data", "my photos.npy", *flags.split()]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--dry-run"])
    assert stop.value.code == 0
    pasted = command_in(capsys.readouterr().out)
    expected = planned(arguments)
    monkeypatch.setattr(auto, "this_machine", lambda device, precision: Machine("cuda", 80e9, 3e14))
    assert planned(pasted) == expected
    assert flags or planned(arguments) != expected
    assert {entry.name for entry in Path.cwd().iterdir()} == {"my photos.npy"}


def test_built_in_digits_can_be_planned_too(capsys):
    assert run("train --preset auto --data digits --minutes 1 --dry-run", capsys)[0] == 0
    assert cli.parse_train(["--data", "digits"]).config.preset == "digits"
    assert cli.parse_train([]).config.preset == "digits"
    arguments = ["train", "--preset", "auto", "--data", "digits"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--dry-run"])
    assert planned(command_in(capsys.readouterr().out)) == planned(arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train --preset auto", "a run is planned by its images: name --data"),
        ("train --minutes 5", "a run is planned by its images: name --data"),
        (
            "train --preset mnist --minutes 5",
            "--minutes 5 fits a plan to a time: leave --preset mnist or --minutes out",
        ),
        ("train --data nowhere --minutes 5", "nowhere does not exist"),
        ("train --data x --minutes -1", "--minutes is -1: it must not be negative"),
        ("train --data x --lr 3", "Did you mean '--learning-rate'?"),
        ("train --resume --out x --minutes 5", "--minutes 5 plans a new run, but --resume"),
        ("check --data nowhere", "nowhere does not exist"),
        ("train --precision tf32 --device cpu", "tf32 is an NVIDIA GPU's, and this is computed on cpu: leave it out"),
        ("train --precision tf32 --device cpu --dry-run", "on cpu: leave it out, or say --precision fp32"),
        ("train --preset aut", "Did you mean 'auto'?"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments, says, capsys):
    assert says in refused(arguments, capsys)
    assert list(Path.cwd().iterdir()) == []


def test_broken_files_are_named_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    assert "a.png (not an image)" in refused("train --data broken", capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken"]


def test_a_preset_that_spoils_the_images_or_takes_days_says_so_first(photos, capsys):
    large = np.zeros((3, 64, 80, 3), dtype=np.uint8)
    large[..., 0] = 200
    np.save("large.npy", large)
    assert run("train --preset cifar10 --data large.npy --dry-run", capsys)[0] == 0
    status, out, _ = run("train --preset mnist --data large.npy --steps 40000 --batch-size 128 --dry-run", capsys)
    assert status == 0
    assert "3 images, 80x64, in colour: --preset mnist makes them 28x28 and grey; --preset auto plans" in out
    said = auto.outlook(cli.parse_train(["--preset", "church256", "--data", "large.npy"]).config, "cpu", "fp32")
    assert any("on this machine: --minutes 30 instead of --preset church256" in line for line in said)
    assert auto.outlook(cli.parse_train(["--preset", "digits"]).config, "cpu", "fp32") == []


def test_the_speed_of_this_machine_is_measured_in_a_moment(monkeypatch):
    ticks = iter(range(1000))
    assert speed._typical_seconds(lambda: None, lambda: next(ticks) / 10) == pytest.approx(0.1)
    monkeypatch.setattr(speed, "BLOCKS", {"cpu": (1, 4, 4)})
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    measured = speed.measured_speed.__wrapped__("cpu", torch.float32)
    assert 1e4 < measured < 1e13


def test_a_time_that_is_none_is_refused_by_its_flag_alone(capsys):
    assert refused("train --data x --minutes -1", capsys).startswith("ddpm-fast: --minutes is -1: it must not be")
