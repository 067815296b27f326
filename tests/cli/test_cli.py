"""The command line as a user meets it: one-line errors, exit statuses, and the files that come out."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tyro")
import ddpm_fast
from ddpm_fast.cli import main as cli
from ddpm_fast.runs.directory import read_config

TINY = "--channels 8 --channel-multipliers 1 --res-blocks 1 --attention-resolutions --groups 4 --batch-size 4"
TINY_RUN = (
    f"{TINY} --steps 3 --cooldown 0 --sample-every 0 --timesteps 25 --schedule linear --beta-end 0.5 --device cpu"
)


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit status, output and errors."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments.split())
    code = stop.value.code
    out, err = capsys.readouterr()
    return (code if isinstance(code, int) else 0), out, err


def refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which arguments are refused."""
    status, _, err = run(arguments, capsys)
    assert status == 2
    assert err.startswith("ddpm-fast: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert "?." not in err
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--out", str(directory), *TINY_RUN.split()])
    assert stop.value.code == 0
    return directory


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("trian", "Did you mean 'train'?"),
        ("train --preset cifr10", "Did you mean 'cifar10'?"),
        ("train --chanels 3", "Did you mean '--channels'?"),
        ("train --schedule cosin", "Did you mean 'cosine'?"),
        ("train --steps many", "--steps"),
        ("train --steps 0", "ddpm-fast: --steps is 0: it must be at least 1. See ddpm-fast train --help"),
        ("train --steps 1.5", "--steps is '1.5': it must be a whole number. See"),
        ("train --learning-rate inf", "--learning-rate is inf: it must be finite. See"),
        ("train --data nowhere.npy", "nowhere.npy does not exist: name a folder of images, a .npy, .npz,"),
        ("train --dropout high", "--dropout is 'high': it must be a number. See"),
        ("train --channel-multipliers 1 x", "--channel-multipliers is ['1', 'x']: it must be whole numbers. See"),
        ("train --steps", "--steps needs a value"),
        ("train --lr 3", "unknown flag --lr. Did you mean '--learning-rate'? See ddpm-fast train --help"),
        ("train --gpus 1", "Did you mean '--device'?"),
        ("train --device gpu", "it must be one of 'auto', 'cpu', 'cuda'. Did you mean 'cuda'? See"),
        ("train --class 3", "unknown flag --class. See ddpm-fast train --help"),
        ("train --config x", "--config x does not exist: name a TOML file of flags by their Python names"),
        ("train --no-compil", "Did you mean '--no-compile'?"),
        ("train --groups 7", "change --channels or --groups. See"),
        ("train --height 9 --width 8", "height 9 does not divide by 2"),
        ("train --resume", "--resume needs --out"),
        ("check --resume", "unknown flag --resume"),
        ("train --preset cifar10", "--data"),
        ("train --data nowhere", "nowhere does not exist"),
        ("train --device cuda", "there is no NVIDIA GPU"),
        ("train stray", "stray"),
        ("sample nowhere", "nowhere does not exist"),
        ("sample x --count 0", "--count is 0"),
        ("sample x --sampler dpm+", "Did you mean 'dpm++'?"),
        ("sample", "there is no run with a checkpoint in runs/: name a run directory or one of its checkpoints/step-*"),
        ("ls nowhere", "nowhere is no directory: name one that holds runs"),
        ("sample x --sampler ddim --eta 2 --first-index -1", "--first-index is -1"),
        ("sample x --eta 1.0", "--eta is 1.0: name the --sampler that it is for"),
        ("sample x --spacing leading", "--spacing is leading: name the --sampler"),
        ("train --sampler ddim", "unknown flag --sampler"),
        ("check nowhere", "nowhere does not exist"),
        (
            "check runs/digits-1 --device cpu --learning_rate=3",
            "--learning-rate cannot change runs/digits-1, a run",
        ),
        (
            "sample nowhere --sampler ddmi",
            "one of 'auto', 'ddpm', 'ddim', 'dpm++'. Did you mean 'ddim'?",
        ),
        ("--completion", "--completion needs the name of a shell: bash, zsh, fish."),
        ("--completion bsh", "Did you mean 'bash'?"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, says, tmp_path, monkeypatch, capsys):
    if "cuda" in arguments:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert says.lower() in refused(arguments, capsys).lower()
    assert list(tmp_path.iterdir()) == []


def test_running_out_of_memory_is_one_line_once_one_image_is_too_many(trained, tmp_path, monkeypatch, capsys):
    def exhausted(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ddpm_fast.engine.sampling.SamplingLoop.run", exhausted)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    said = refused(f"sample {trained} --device cpu --batch-size 7 --out {tmp_path}", capsys)
    assert "even for one image at a time" in said  # 7 were halved until there was one
    assert "--precision bf16" in said


def test_sampling_writes_what_is_promised_and_touches_nothing_else(trained, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    status, _, _ = run(f"sample {trained} -n 3 --first-index 17 --seed 5 --out {out} --animate", capsys)
    assert status == 0
    names = {entry.name for entry in out.iterdir()}
    pictures = {"000017.png", "000018.png", "000019.png", "grid.png", "animation.gif"}
    assert names == pictures | {"samples.json", "mine.txt"}
    with Image.open(out / "000017.png") as image:
        assert (image.mode, image.size) == ("L", (8, 8))
    facts = json.loads((out / "samples.json").read_text())
    expected = {"seed": 5, "first_index": 17, "count": 3, "sampler": "dpm++", "steps": 20, "weights": "ema"}
    assert facts | expected == facts
    assert facts["seconds"] > 0
    with Image.open(out / "animation.gif") as image:
        assert getattr(image, "n_frames", 1) > 10  # of 20 steps; Pillow leaves out frames that are like the last


def test_image_17_is_image_17(trained, tmp_path, capsys):
    run(f"sample {trained} -n 20 --seed 3 --sampler ddim --steps 5 --out {tmp_path / 'many'}", capsys)
    run(f"sample {trained} -n 1 --seed 3 --sampler ddim --steps 5 --first-index 17 --out {tmp_path / 'one'}", capsys)
    many, one = (np.asarray(Image.open(tmp_path / name / "000017.png"), dtype=int) for name in ("many", "one"))
    assert np.abs(many - one).max() <= 1


def test_default_out_names_sampler_steps_and_seed(trained, capsys):
    run(f"sample {trained} -n 1 --sampler dpm++ --steps 4 --seed 9", capsys)
    assert (trained / "samples/dpm++-4-seed9/000000.png").exists()


@pytest.mark.parametrize("steps", [0, 1, 24, 25])
def test_any_number_of_steps_up_to_t(trained, tmp_path, steps, capsys):
    assert run(f"sample {trained} -n 1 --steps {steps} --out {tmp_path / 'out'}", capsys)[0] == 0


def test_more_steps_than_timesteps_are_refused(trained, capsys):
    assert "--steps is 26: it must lie in 1..25" in refused(f"sample {trained} --steps 26", capsys)


def test_a_finished_run_says_so_and_more_steps_continue_it(tmp_path, capsys):
    assert run(f"train --out {tmp_path}/run {TINY_RUN}", capsys)[0] == 0
    assert "--resume" in refused(f"train --out {tmp_path}/run {TINY_RUN}", capsys)
    status, out, _ = run(f"train --out {tmp_path}/run --resume", capsys)
    assert status == 0
    assert "is finished" in out
    status, out, _ = run(f"train --out {tmp_path}/run --resume --steps 5", capsys)
    assert status == 0
    assert "continuing at step 3" in out
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-0000005\n"
    assert "--batch-size 4 -> 8" in refused(f"train --out {tmp_path}/run --resume --batch-size 8", capsys)


@pytest.mark.parametrize("torn", ["", '{"config": {"uu'])
def test_resume_without_configuration_and_checkpoint_is_refused(tmp_path, torn, capsys):
    """Flags left out would be the preset's, and not the run's."""
    (tmp_path / "config.json").write_text(torn)
    for how in ("--resume", "--resume-or-start", "--resume_or_start"):
        said = refused(f"train --out {tmp_path} {how} {TINY_RUN}", capsys)
        assert f"{tmp_path}/config.json is torn, and there is no checkpoint" in said
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "other", ["[]", "3", "{}", '{"config": []}', '{"config": {}}', '{"config": [], "fingerprint": ""}']
)
def test_what_is_whole_but_no_run_s_is_not_resumed_with_the_preset_s_defaults(tmp_path, other, capsys):
    (tmp_path / "config.json").write_text(other)
    said = refused(f"train --out {tmp_path} --resume", capsys)
    assert str(tmp_path / "config.json") in said
    assert (tmp_path / "config.json").read_text() == other


def test_a_failed_check_exits_with_3_and_writes_nothing(tmp_path, capsys):
    hopeless = f"{TINY_RUN} --learning-rate 30"
    status, out, err = run(f"train --out {tmp_path}/run {hopeless}", capsys)
    assert status == 3
    assert re.search(r"\n  FAIL    some steps at --learning-rate 30 lower the loss.*; look at --learning-rate\n", out)
    assert "CHANGED --learning-rate is near its preset's: expected about 0.002" in out
    assert err == "ddpm-fast: the mathematics is wrong: nothing was trained\n"
    assert not (tmp_path / "run").exists()
    status, out, err = run(f"check {hopeless}", capsys)
    assert status == 3
    assert "nothing was trained" not in out + err
    assert "(if this is meant: --accept fit)" in out


def test_a_fault_that_is_accepted_is_trained_with_and_remembered(tmp_path, capsys):
    hopeless = f"{TINY_RUN} --learning-rate 30 --accept fit"
    status, out, _ = run(f"train --out {tmp_path}/run {hopeless}", capsys)
    assert (status, "CHANGED some steps at --learning-rate 30 lower" in out) == (0, True)
    found = read_config(tmp_path / "run")
    assert found is not None
    assert found[0].checks.accept == ("fit",)
    status, out, _ = run(f"train --out {tmp_path}/strict {hopeless} --strict", capsys)
    assert (status, "leave out --strict" in out) == (3, True)


def test_checks_that_pass_before_a_run_are_one_line(tmp_path, capsys):
    status, out, _ = run(f"train --out {tmp_path}/run {TINY_RUN}", capsys)
    assert status == 0
    assert "FAIL" not in out
    assert re.search(
        r"^\d+ checks passed, \d+ CHANGED in [\d.]+ s$", out, re.MULTILINE
    )  # other values than the preset's
    status, out, _ = run(
        f"train --out {tmp_path}/digits --steps 1 --sample-every 0 --batch-size 8 --device cpu", capsys
    )
    assert re.fullmatch(r"checking the mathematics: \d+ checks passed in [\d.]+ s", out.splitlines()[0])
    assert "expected" not in out


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_sampling_leaves_nothing_and_says_so(trained, tmp_path, monkeypatch, capsys, number, expected):
    def interrupted(*arguments):
        os.kill(os.getpid(), number)

    name = signal.Signals(number).name
    monkeypatch.setattr("ddpm_fast.engine.sampling.SamplingLoop.run", interrupted)
    status, _, err = run(f"sample {trained} --out {tmp_path}/out", capsys)
    assert (status, err) == (expected, f"ddpm-fast: {name}: interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr("ddpm_fast.runs.samples.save_picture", interrupted)
    status, _, err = run(f"sample {trained} --out {tmp_path}/out", capsys)
    said = f"ddpm-fast: {name}: interrupted; {tmp_path}/out: not complete; the same command goes on\n"
    assert (status, err) == (expected, said)


def test_a_copied_model_needs_two_files(trained, tmp_path, capsys):
    copied = tmp_path / "a model"
    copied.mkdir()
    for name in ("ema.safetensors", "state.json"):
        shutil.copy(trained / "checkpoints/step-0000003" / name, copied)
    options = "-n 2 --sampler ddim --steps 5 --seed 4"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["sample", str(copied), *options.split()])
    run(f"sample {trained} --out {tmp_path}/whole {options}", capsys)
    whole = (tmp_path / "whole/000001.png").read_bytes()
    assert (copied / "samples/ddim-5-seed4/000001.png").read_bytes() == whole
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sample", str(copied), "--weights", "raw"])
    assert "model.safetensors is missing" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    assert run("--version", capsys)[:2] == (0, f"ddpm-fast {ddpm_fast.__version__}\n")


@pytest.mark.slow
def test_a_run_is_checked_in_full(trained, capsys):
    status, out, _ = run(f"check {trained}", capsys)
    assert status == 0
    assert "ok      the U-Net is the textbook's, block by block" in out
    assert "ok      the average is lent for previews" in out


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(arguments: list[str]) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "_train", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train"])


def test_an_unwritable_out_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(f"train --out {tmp_path}/file/run {TINY_RUN}", capsys)


def test_a_run_is_checked_as_asked_not_as_it_was_trained(trained, capsys):
    status, out, _ = run(f"check {trained} --device cpu --no-kernels", capsys)
    assert status == 0
    assert "none run here: --no-kernels" in out
