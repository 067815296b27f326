"""A training process that is killed again and again, and ends with the bytes of one that was not.

SIGKILL comes at file operations of the process, all of which an audit hook sees: at one as it begins, or some
milliseconds after it, in the midst of whatever is done then. Which ones is a fixed sequence, spread over all that a run
does: building the data's cache, starting, stepping, evaluating, logging, saving, drawing. Processes are forked from
one that has PyTorch imported: else most of a kill's time would go by before there is anything to kill.

More kills than the slow tests make, a soak of a quarter of an hour:

    KILLS=200 python -m pytest -m slow --timeout 7200 tests/runs/test_kills.py
"""

import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from ddpm_fast.runs import checkpoint

pytest.importorskip("tyro")

KILLS = int(os.environ.get("KILLS", "24"))
NETWORK = "--channels 8 --channel-multipliers 1 --res-blocks 1 --attention-resolutions --groups 4 --dropout 0.1"
TRAIN = (
    f"train --preset digits {NETWORK} --timesteps 20 --schedule linear --beta-end 0.5 --batch-size 64 --warmup-steps 5 "
    "--cooldown 0.2 --flip --device cpu --data pictures --log-every 2 --sample-every 6 --save-every 3 --keep-last 4 "
    "--keep-every 15"
)
TURN = (5**0.5 - 1) / 2
"""Of a sequence that comes everywhere: the golden ratio's multiples, modulo 1."""


def train(directory: Path, steps: int, cache: str, kill_at: int, seconds: float) -> None:
    """Train in a process of its own, which kills itself some seconds after one of its file operations."""
    os.chdir(directory)
    os.environ["XDG_CACHE_HOME"] = str(directory / cache)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    operations = itertools.count(1)

    def kill_soon() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def look(event: str, arguments: tuple) -> None:
        if event.split(".")[0] in ("open", "os", "shutil") and any(
            isinstance(argument, str | Path) and str(argument).startswith(("run/", str(directory)))
            for argument in arguments[:2]
        ):
            number = next(operations)
            if number == kill_at and seconds == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            elif number == kill_at:
                threading.Thread(target=kill_soon, daemon=True).start()

    import ddpm_fast.launch
    from ddpm_fast.cli import main

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a kill would leave behind
    ddpm_fast.launch.check_run = lambda *given: []  # the mathematics is other tests' to check
    sys.addaudithook(look)
    status = main.run([*TRAIN.split(), "--out", "run", "--steps", str(steps), "--resume-or-start"])
    sys.stdout.flush()
    os._exit(status)


class Trainings:
    """Starts training processes in a directory, one after the other."""

    def __init__(self, directory: Path, steps: int) -> None:
        self.directory, self.steps = directory, steps
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["ddpm_fast.cli.commands", "torch.utils.tensorboard"])
        (directory / "pictures").mkdir(parents=True)
        for number in range(40):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / "pictures" / f"{number}.png")

    def start(self, cache: str = "cache", kill_at: int = 0, seconds: float = 0.0) -> int | None:
        """Train until the end, or a kill; return the exit status."""
        arguments = (self.directory, self.steps, cache, kill_at, seconds)
        process = self.processes.Process(target=train, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()


def contents(run: Path) -> dict[str, bytes]:
    """Return what a run leaves and must not depend on its kills, by path."""
    kept = {
        str(file.relative_to(run)): file.read_bytes()
        for place in ("checkpoints", "evaluation", "samples")
        for file in (run / place).rglob("*")
        if file.is_file()
    }
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        values = json.loads(line)
        del values["wall"]
        kept[f"metrics {number}"] = json.dumps(values).encode()
    return kept


def require_whole(run: Path) -> int:
    """Require that all listed checkpoints are whole; return the newest one's step."""
    steps = checkpoint.steps_saved(run)
    for step in steps[:3]:
        checkpoint.read(checkpoint.path_of(run, step)).verify()
    return max(steps, default=0)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps = max(60, 5 * KILLS // 2)  # some are left to do after the last kill
    whole = Trainings(tmp_path / "whole", steps)
    assert whole.start() == 0, whole.log
    killed = Trainings(tmp_path / "killed", steps)
    run, starts = tmp_path / "killed/run", []
    for number in range(KILLS):
        # A process starts by some 70 file operations, then a step has about 11, and three of them a checkpoint.
        # Every third kill comes while it starts, with the cache to be built.
        turn = number * TURN % 1
        starting = number % 3 == 0
        kill_at = 1 + int(turn * 70) if starting else 70 + int(turn * 60)
        seconds = 0.0 if number % 2 else 0.001 * (1 + int(turn * 40))
        status = killed.start(f"cache-{number}" if starting else "cache", kill_at, seconds)
        assert status == -signal.SIGKILL, (number, kill_at, status, killed.log)
        before = max(starts, default=0)
        newest = require_whole(run)
        assert newest >= before
        said = re.search(r"continuing at step (\d+)", killed.log)
        if said:
            assert int(said[1]) == before
        starts.append(newest)
    assert killed.start() == 0, killed.log
    assert f"continuing at step {starts[-1]}" in killed.log
    print(f"{KILLS} kills; the newest checkpoint after each was that of step {starts}")
    assert list((tmp_path / "killed/run").rglob(".*")) == []
    found, expected = contents(run), contents(tmp_path / "whole/run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
