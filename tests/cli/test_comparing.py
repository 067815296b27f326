"""compare, --against and sweep from the command line, from one end to the other."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tyro")
from ddpm_fast.cli import main as cli

SMALL = [
    "--channels",
    "8",
    "--channel-multipliers",
    "1",
    "--attention-resolutions",
    "--groups",
    "4",
    "--timesteps",
    "40",
    "--batch-size",
    "32",
]
SMALL += ["--sample-every", "0", "--warmup-steps", "1", "--accept", "configuration"]
SMALL += ["--prediction", "eps", "--learning-rate", "1e-3", "--cooldown", "0", "--timestep-density", "uniform"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "base"
    assert cli.run(["train", "--preset", "digits", *SMALL, "--steps", "210", "--out", str(run)]) == 0
    return run


@pytest.mark.slow
def test_a_run_is_compared_with_itself_and_drawn(base, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.run(["compare", str(base), str(base), "--out", str(page), "--images", "4"]) == 0
    out = capsys.readouterr().out
    assert "nothing: one configuration, one code, one machine" in out
    assert "+0.00%" in out
    text = page.read_text()
    assert text.count("data:image/png") == 1  # a picture for each run, and these are one
    assert f"{base}, step 210</figcaption>" in text
    assert "averaged weights, dpm++ in 20 steps." in text


@pytest.mark.slow
def test_a_sweep_trains_stops_losers_and_goes_on_where_it_was(base, tmp_path, capsys):
    out = tmp_path / "sweep"
    values = ["--learning-rate", "1e-3", "1e-5", "--prediction", "eps", "v"]
    assert cli.run(["sweep", "--against", str(base), "--out", str(out), "--images", "0", *values]) == 0
    said = capsys.readouterr().out
    assert "learning-rate=1e-3,prediction=eps is the base" in said
    verdict = json.loads((out / "learning-rate=1e-5,prediction=eps/verdict.json").read_text())
    assert (verdict["verdict"], verdict["step"]) == ("higher", 200)
    assert f"differs from {base} in --learning-rate: 0.001 -> 1e-05" in said
    assert "stopped at step 200 of 210: decided; trained in" in said
    assert (out / "page.html").exists()
    (out / "learning-rate=1e-5,prediction=v/verdict.json").unlink()
    assert cli.run(["sweep", "--out", str(out), "--resume", "--images", "0"]) == 0
    again = capsys.readouterr().out
    assert "learning-rate=1e-5,prediction=eps has ended: higher" in again
    assert "learning-rate=1e-5,prediction=v has ended" not in again
    assert (out / "learning-rate=1e-5,prediction=v/verdict.json").exists()


@pytest.mark.slow
def test_a_run_that_cannot_be_trained_does_not_end_a_sweep(base, tmp_path, capsys):
    out = tmp_path / "sweep"
    values = ["--learning-rate", "1e30", "2e-3"]  # the first makes weights that are not finite
    assert cli.run(["sweep", "--against", str(base), "--out", str(out), "--images", "0", *values]) == 0
    said = capsys.readouterr()
    assert "learning-rate=1e30 failed" in said.out
    assert (out / "learning-rate=2e-3/verdict.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "a"], "compare needs two runs or more, not 1"),
        (["compare", "a", "b"], "a is no run .it does not exist"),
        (["sweep", "--learning-rate", "1"], "sweep needs --against"),
        (["sweep", "--against", "a"], "nothing to try"),
        (["sweep", "--resume"], "--resume needs --out"),
        (["sweep", "--against", "a", "--learning-rate", "1e-3"], "a is no run"),
        (["train", "--until-decided"], "--until-decided needs --against"),
        (["train", "--against", "a"], "a is no run"),
        (["train", "--against", "a", "--preset", "mnist"], "leave one of them out"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message.replace(".it", "(it") in error
    assert list(tmp_path.iterdir()) == []
