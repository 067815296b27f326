"""Flags to configurations, and the help that explains them."""

import re

import pytest

pytest.importorskip("tyro")
from ddpm_fast.cli import main as cli
from ddpm_fast.cli.parsing import flags_of
from ddpm_fast.config import with_training
from ddpm_fast.errors import InputError
from ddpm_fast.presets import PRESETS


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_check_leaves_out_what_it_does_not_look_at(capsys):
    out = help_of("check", capsys)
    assert "--learning-rate" in out
    assert not re.search(r"--steps|--log-every|--save-every|--sample-every", out)
    assert cli.parse_check(["--save-every", "3"]).config == with_training(PRESETS["digits"], save_every=3)


def test_help_explains_every_field(capsys):
    out = help_of("train", capsys)
    for flag in flags_of(cli.TrainArguments):
        assert flag in out or flag.replace("--", "--no-") in out
    assert out.count("(default:") >= len(flags_of(cli.TrainArguments)) - 5  # the rest wraps over a line's end


def test_presets_give_the_defaults():
    parsed = cli.parse_train(["--preset", "church256", "--seed", "4"])
    assert parsed.config.unet == PRESETS["church256"].unet
    assert parsed.config.training.seed == 4
    with pytest.raises(InputError, match="unknown flag"):
        cli.parse_train(["--bogus"])
