"""What `ddpm-fast ls` does, and which run is meant where none is named."""

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ddpm_fast.cli.arguments import ListArguments
from ddpm_fast.errors import require
from ddpm_fast.runs.listing import RUNS, RunState, find_runs, newest_run, state_of

HEAD = ("run", "step", "loss", "evaluation", "size", "last written", "state")


def run_meant(named: str) -> Path:
    """Return the run or checkpoint that is named, or the newest run, saying which.

    Raises:
        InputError: none is named, and there is none.
    """
    if named:
        return Path(named)
    newest = newest_run()
    print(f"{newest} is the newest run")
    return newest


def list_runs(arguments: ListArguments) -> int:
    """List the runs in a directory; returns the exit status."""
    directory = Path(arguments.runs)
    require(directory.is_dir() or directory == RUNS, f"{directory} is no directory: name one that holds runs")
    states = [state_of(run) for run in find_runs(directory)]
    if arguments.json:
        print(json.dumps([_plain(state) for state in states], indent=2))
    elif states:
        print("\n".join(_aligned([HEAD, *map(_row, states)])))
    else:
        print(f"there are no runs in {directory}: ddpm-fast train makes one")
    return 0


def _row(state: RunState) -> tuple[str, ...]:
    written = f"{datetime.fromtimestamp(state.written):%Y-%m-%d %H:%M}" if state.written else "-"
    steps = "?" if state.steps is None else f"{state.steps:,}"
    losses = ("-" if loss is None else f"{loss:.4f}" for loss in (state.loss, state.evaluation_loss))
    said = f"{state.state}: {state.wrong}" if state.wrong else state.state
    return (str(state.path), f"{state.step:,}/{steps}", *losses, _in_units(state.bytes), written, said)


def _in_units(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines: names and what is said to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        numbers = (text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]))
    return lines


def _plain(state: RunState) -> dict[str, object]:
    written = datetime.fromtimestamp(state.written, UTC).isoformat(timespec="seconds") if state.written else None
    return {**dataclasses.asdict(state), "path": str(state.path), "written": written}
