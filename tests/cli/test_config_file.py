"""Flags that are written down: the file wins over the preset, what is given over the file, and errors name the file."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tyro")
from ddpm_fast.cli import main as cli
from ddpm_fast.config import with_training
from ddpm_fast.errors import InputError
from ddpm_fast.options import StartOptions
from ddpm_fast.presets import PRESETS

FLAT = """
preset = "mnist"
batch_size = 64
learning_rate = 1e-3
flip = true
kernels = false
channel_multipliers = [1, 2]
attention_resolutions = []
data = "my photos"
out = "runs/mine"
"""
BY_PART = """
preset = "mnist"
[unet]
channel_multipliers = [1, 2]
attention_resolutions = []
[data]
data = "my photos"
flip = true
[training]
batch_size = 64
learning_rate = 1e-3
kernels = false
[start]
out = "runs/mine"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("mine.toml")


@pytest.mark.parametrize("text", [FLAT, BY_PART])
def test_the_file_wins_over_the_preset_and_what_is_given_over_the_file(file, text):
    file.write_text(text)
    mnist = PRESETS["mnist"]
    config = replace(mnist, unet=replace(mnist.unet, channel_multipliers=(1, 2), attention_resolutions=()))
    config = replace(config, data=replace(mnist.data, data="my photos", flip=True))
    config = with_training(config, batch_size=64, learning_rate=1e-3, kernels=False)
    parsed = cli.parse_train(["--config", "mine.toml"])
    assert (parsed.config, parsed.start) == (config, StartOptions("runs/mine"))
    given = ["--batch-size=32", "--no-flip", "--config=mine.toml", "--kernels", "--channel-multipliers", "1", "2", "3"]
    config = with_training(config, batch_size=32, kernels=True)
    config = replace(
        config, data=replace(config.data, flip=False), unet=replace(config.unet, channel_multipliers=(1, 2, 3))
    )
    assert cli.parse_train(given).config == config
    assert cli.parse_train(["--preset", "digits", "--config", "mine.toml"]).config.training.steps == 700


def test_check_reads_it_too(file):
    file.write_text(BY_PART)
    assert cli.parse_check(["--config", "mine.toml"]).config == cli.parse_train(["--config", "mine.toml"]).config
    with pytest.raises(InputError, match="cannot change runs/digits-1"):
        cli.parse_check(["runs/digits-1", "--config", "mine.toml"])


def test_every_flag_of_train_can_be_written_down(file):
    parsed = cli.parse_train([])
    parts = {name: getattr(parsed.config, name) for name in ("unet", "diffusion", "data", "training", "checks")}
    lines = []
    for name, part in {**parts, "start": parsed.start}.items():
        lines += [f"[{name}]", *(f"{key} = {toml(value)}" for key, value in vars(part).items())]
    file.write_text("\n".join(lines))
    again = cli.parse_train(["--config", "mine.toml"])
    assert (again.config, again.start) == (parsed.config, parsed.start)


def toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else repr(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("chanels = 3", "mine.toml: unknown key 'chanels'. Did you mean 'channels'?"),
        ("lr = 3", "mine.toml: unknown key 'lr'. Did you mean 'learning_rate'?"),
        ("zzz = 3", "mine.toml: unknown key 'zzz'."),
        ("sampler = 'ddim'", "mine.toml: unknown key 'sampler'."),
        ("config = 'other.toml'", "mine.toml: unknown key 'config'."),
        ("[unet]\nchanels = 3", "mine.toml: unknown key '[unet] chanels'. Did you mean 'channels'?"),
        ("[unet]\nsteps = 3", "mine.toml: unknown key '[unet] steps'. It belongs to [training]."),
        ("[trainng]\nsteps = 3", "mine.toml: unknown part [trainng]. Did you mean 'training'?"),
        ("steps = 3\n[training]\nsteps = 4", "mine.toml: 'steps' is there twice, flat and in a part: leave one out"),
        ("steps = 0", "mine.toml: --steps is 0: it must be at least 1"),
        ("steps = 'many'", "mine.toml: --steps is 'many': it must be a whole number"),
        ("steps = true", "mine.toml: steps is True: it must be a number or text"),
        ("flip = 1", "mine.toml: flip is 1: it must be true or false"),
        ("channel_multipliers = 2", "mine.toml: channel_multipliers is 2: it must be a list"),
        ("channel_multipliers = ['x']", "mine.toml: --channel-multipliers is ['x']: it must be whole numbers"),
        ("schedule = 'cosin'", "mine.toml: --schedule is 'cosin': it must be one of"),
        ("preset = 'mnits'", "mine.toml: unknown preset 'mnits'"),
        ("steps = 2024-01-01", "steps is datetime.date(2024, 1, 1): it must be a number or text"),
        ("steps = ", "mine.toml is not readable TOML (Invalid value (at end of document))"),
        ("steps = 3\nsteps = 4", "mine.toml is not readable TOML (Cannot overwrite a value"),
    ],
)
def test_what_cannot_be_meant_is_one_line_with_file_and_key(file, text, says, capsys):
    file.write_text(text)
    assert cli.run(["train", "--config", "mine.toml"]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert [entry.name for entry in Path().iterdir()] == ["mine.toml"]


def test_a_wrong_flag_that_was_given_is_not_the_files(file):
    file.write_text("batch_size = 64")
    with pytest.raises(InputError, match=r"^--steps is 0"):
        cli.parse_train(["--config", "mine.toml", "--steps", "0"])
    with pytest.raises(InputError, match=r"^mine.toml: --batch-size 64 does not divide"):
        cli.parse_train(["--config", "mine.toml", "--accumulate", "7"])


@pytest.mark.parametrize("name", ["nowhere.toml", "."])
def test_a_file_that_is_not_there_is_one_line(name, file, capsys):
    assert cli.run(["train", "--config", name]) == 2
    assert capsys.readouterr().err.startswith(f"ddpm-fast: --config {name} ")


def test_a_run_is_continued_by_the_file_that_it_was_started_with(file, tmp_path, monkeypatch):
    config = with_training(PRESETS["mnist"], batch_size=64)
    monkeypatch.setattr("ddpm_fast.planning.start.starting_config", lambda name, *_: replace(config, preset=name))
    file.write_text('preset = "mnist"\nbatch_size = 64\nsteps = 50000\nout = "run"')
    parsed = cli.parse_train(["--config", "mine.toml", "--resume"])
    assert parsed.config == with_training(config, steps=50_000)
    assert parsed.start == StartOptions("run", resume=True)
