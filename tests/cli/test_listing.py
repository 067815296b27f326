"""Which runs there are, and which one is meant where none is named: with damaged ones among them, and no traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")
from filelock import FileLock

from ddpm_fast.cli import main as cli
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.flags import to_dict
from ddpm_fast.runs.directory import read_metrics
from ddpm_fast.runs.listing import find_runs, is_running, newest_run, state_of
from ddpm_fast.runs.lock import NAME as LOCK
from ddpm_fast.runs.run import Run

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(data="digits"),
    training=TrainingConfig(steps=4, batch_size=4, log_every=2, save_every=2, sample_every=0, device="cpu"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    Run(directory, TINY, open_dataset(TINY.data, TINY.unet), None, progress=False).train()
    return directory


@pytest.fixture
def runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with runs of all kinds; the working directory holds it."""
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    names = ("digits-1", "digits-2", "digits-10", "sweep-1/a", "torn", "cut", "foreign", "garbled")
    for name in names:
        shutil.copytree(finished, runs / name)
    shutil.rmtree(runs / "digits-2/checkpoints/step-0000004")
    (runs / "torn/config.json").write_text('{"config": {"uu')
    weights = runs / "cut/checkpoints/step-0000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (runs / "foreign/config.json").write_text("[]")
    (runs / "garbled/metrics.jsonl").write_bytes(b'\xff\xfe{"step"')
    (runs / "new").mkdir()
    (runs / "new" / LOCK).write_text("")
    (runs / "notes").mkdir()
    (runs / "notes/mine.txt").write_text("no run")
    for second, name in enumerate(names):
        for state in (runs / name).glob("checkpoints/*/state.json"):
            os.utime(state, (1e9 + second, 1e9 + second))
    return runs


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.run(["ls", *arguments]) == 0
    return capsys.readouterr().out


def test_every_run_is_listed_with_what_is_wrong_with_it(runs, finished, capsys):
    before = {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()}
    head, *lines = listed(capsys).splitlines()
    assert {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()} == before
    rows = {line.split()[0].removeprefix("runs/"): line for line in lines}
    assert list(rows) == ["cut", "digits-1", "digits-2", "digits-10", "foreign", "garbled", "new", "sweep-1/a", "torn"]
    last = read_metrics(finished)[-1]
    expected = f"4/4  {last['loss']:.4f}  {last['evaluation']['ema']:.4f}"
    assert " ".join(expected.split()) in " ".join(rows["digits-1"].split())
    states = {name: line[head.index("state") :] for name, line in rows.items()}
    for name, state in (("digits-1", "finished"), ("digits-2", "stopped"), ("sweep-1/a", "finished")):
        assert states[name] == state
    assert states["torn"] == "damaged: config.json is missing or torn"
    assert states["new"] == "damaged: config.json is missing or torn"
    assert states["cut"].startswith("damaged: checkpoints/step-0000004/model.safetensors is truncated")
    assert states["foreign"].startswith("damaged: config.json is no run's")
    assert states["garbled"].startswith("damaged: metrics.jsonl cannot be read")
    columns = [head.index("loss") + 4, head.index("size") + 4, head.index("last written") + 12]
    assert {line[column] for line in lines for column in columns} == {" "}


def test_the_list_for_scripts_says_the_same(runs, finished, capsys):
    found = {each["path"]: each for each in json.loads(listed(capsys, "--json"))}
    whole = found["runs/digits-1"]
    size = sum(file.stat().st_size for file in finished.rglob("*") if file.is_file())
    last = read_metrics(finished)[-1]
    expected = {"state": "finished", "step": 4, "steps": 4, "loss": last["loss"], "bytes": size, "wrong": ""}
    assert whole | expected == whole
    assert whole["evaluation_loss"] == last["evaluation"]["ema"]
    assert found["runs/torn"]["steps"] is None
    assert [each["path"] for each in json.loads(listed(capsys, "runs/digits-2", "--json"))] == ["runs/digits-2"]


def test_no_runs_are_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert listed(capsys) == "there are no runs in runs: ddpm-fast train makes one\n"
    assert json.loads(listed(capsys, "--json")) == []
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_is_running_as_long_as_another_process_holds_its_lock(runs):
    run = runs / "digits-1"
    assert not is_running(run)
    command = [sys.executable, "-c", HOLD, str(run / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_running(run)
        assert state_of(run).state == "running"
        process.kill()
        process.wait()
    assert not is_running(run)
    assert (run / LOCK).exists()
    with FileLock(runs / "new" / LOCK, blocking=False):
        assert (state_of(runs / "new").state, state_of(runs / "new").wrong) == ("running", "")  # it is being checked


def test_the_newest_run_is_the_one_that_saved_last(runs, capsys):
    assert newest_run() == runs / "garbled"
    state = runs / "sweep-1/a/checkpoints/step-0000002/state.json"
    os.utime(state, (2e9, 2e9))
    assert newest_run() == runs / "sweep-1/a"
    assert set(find_runs(runs / "sweep-1")) == {runs / "sweep-1/a"}
    assert cli.run(["sample", "-n", "1", "--sampler", "ddim", "--steps", "2", "--device", "cpu"]) == 0
    assert "runs/sweep-1/a is the newest run\n" in capsys.readouterr().out
    assert (runs / "sweep-1/a/samples/ddim-2-seed0/000000.png").exists()


def test_more_steps_than_were_saved_are_seen_in_what_was_logged(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    more = with_training(TINY, steps=9)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"config": to_dict(more)}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": "high", "evaluation": 3}\n')
    found = state_of(run)
    assert (found.step, found.steps, found.state, found.loss) == (6, 9, "stopped", None)
