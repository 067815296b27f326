"""Which runs there are: where each stands, whether it is running, and what is wrong with it. Nothing is written."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ddpm_fast.errors import InputError
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.directory import read_config, read_metrics
from ddpm_fast.runs.lock import NAME as LOCK

RUNS = Path("runs")
"""Where runs are by default."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands."""

    path: Path
    state: Literal["running", "finished", "stopped", "damaged"]
    step: int
    """That was logged or saved last."""
    steps: int | None
    """That it shall have in the end; None where its config.json cannot be read."""
    loss: float | None
    evaluation_loss: float | None
    """Of the averaged weights, where it was evaluated last."""
    bytes: int
    written: float
    """Seconds since 1970, of the newest file."""
    wrong: str
    """What is damaged, or ""."""


def is_running(run: Path) -> bool:
    """Return whether a process trains a run: whether its lock is held."""
    file = run / LOCK
    if not file.exists():
        return False
    try:
        with FileLock(file, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to open
        return False


def _is_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("config.json", "checkpoints", LOCK))


def find_runs(parent: Path) -> Iterator[Path]:
    """Yield the runs in a directory, and those of sweeps in it, by name; itself if it is one."""
    if _is_run(parent):
        yield parent
        return
    for child in _directories(parent):
        yield from [child] if _is_run(child) else filter(_is_run, _directories(child))


def _directories(parent: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted((each for each in parent.iterdir() if each.is_dir()), key=_in_natural_order)
    return []


def _in_natural_order(path: Path) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def state_of(run: Path) -> RunState:
    """Return where a run stands; whatever is damaged is said, and not raised."""
    wrong, config, metrics, running = list[str](), None, list[dict[str, Any]](), is_running(run)
    try:
        found = read_config(run)
        config = found[0] if found else None
        wrong += [] if found or running else ["config.json is missing or torn"]
    except InputError as error:
        wrong.append(str(error).removeprefix(f"{run}/"))
    try:
        metrics = read_metrics(run)
        (run / "metrics.jsonl").read_text()  # whose damaged lines are left out silently
    except FileNotFoundError:
        pass  # nothing has been logged yet
    except (OSError, ValueError) as error:
        wrong.append(f"metrics.jsonl cannot be read ({error})")
    saved, broken = _checkpoints(run)
    logged = max((int(line["step"]) for line in metrics), default=0)
    steps, step = config.training.steps if config else None, max(saved, logged)
    evaluated = [line["evaluation"]["ema"] for line in metrics if "ema" in _dictionary(line.get("evaluation"))]
    size, written = _size_and_time(run)
    return RunState(
        run,
        _state(running, bool(wrong or broken), steps is not None and saved >= steps),
        step,
        steps,
        _number(metrics[-1].get("loss")) if metrics else None,
        _number(evaluated[-1]) if evaluated else None,
        size,
        written,
        "; ".join(wrong + broken[:1]),
    )


def _state(running: bool, damaged: bool, finished: bool) -> Literal["running", "finished", "stopped", "damaged"]:
    if running:
        return "running"
    if damaged:
        return "damaged"
    return "finished" if finished else "stopped"


def _checkpoints(run: Path) -> tuple[int, list[str]]:
    """Return the newest whole checkpoint's step, 0 without one, and what is wrong with the others, newest first."""
    newest, broken = 0, list[str]()
    for path in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            newest = max(newest, checkpoint.read(path).step)
        except InputError as error:
            broken.append(str(error).removeprefix(f"{run}/"))
    return newest, broken


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _size_and_time(directory: Path) -> tuple[int, float]:
    size, newest = 0, 0.0
    for file in directory.rglob("*"):
        with contextlib.suppress(OSError):  # deleted just now, or not ours to see
            facts = file.lstat()
            size += facts.st_size if file.is_file() else 0
            newest = max(newest, facts.st_mtime) if file.is_file() and file.name != LOCK else newest
    return size, newest


def newest_run(parent: Path = RUNS) -> Path:
    """Return the run whose last checkpoint is the newest.

    Raises:
        InputError: there is none.
    """
    times = dict[Path, float]()
    for run in find_runs(parent):
        for state in (run / "checkpoints").glob("step-*/state.json"):
            with contextlib.suppress(OSError):
                times[run] = max(times.get(run, 0.0), state.stat().st_mtime)
    if not times:
        raise InputError(
            f"there is no run with a checkpoint in {parent}/: name a run directory or one of its checkpoints/step-*"
        )
    return max(times, key=lambda run: times[run])
