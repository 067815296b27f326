"""A sweep: all combinations of some flags' values, each a run of its own that is judged against one base.

DIR/
  sweep.json                          what it consists of
  learning-rate=2e-3,prediction=v/    a run each, see `directory`, with its verdict.json once it has ended
  page.html                           all of them beside the base
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_fast.errors import InputError
from ddpm_fast.files import parse_json, replace_file
from ddpm_fast.runs.compare import Difference, RecordedRun, differences

NOT_SWEPT = ("preset", "seed", "data", "float-range", "skip-bad", "holdout", "height", "width", "image-channels")
"""Flags that decide which images are seen, and with what noise."""
LONGEST_NAME = 200
"""Bytes of a directory's name; file systems take 255."""
FAILED = "failed"
"""The verdict on a run that could not be trained to its end."""

Grid = Mapping[str, Sequence[str]]
"""Values to try, as they are typed, by flag: {"learning-rate": ["1e-3", "2e-3"]}."""


@dataclass(frozen=True)
class Plan:
    """What a sweep consists of."""

    against: str
    """The base: a run directory."""
    grid: Grid

    def combinations(self) -> dict[str, list[str]]:
        """Return each combination's flags as train takes them, by the name of its directory."""
        choices = [[(name, value) for value in values] for name, values in self.grid.items()]
        return {_name(pairs): _arguments(pairs) for pairs in itertools.product(*choices)}

    def write(self, directory: Path) -> None:
        """Keep the plan, so that the sweep can be continued.

        Raises:
            InputError: it cannot be written.
        """
        values = {"against": self.against, "grid": self.grid}
        replace_file(directory / "sweep.json", (json.dumps(values, indent=2) + "\n").encode())


def read_plan(directory: Path) -> Plan:
    """Return the plan of a sweep that is continued.

    Raises:
        InputError: there is none, or it is damaged.
    """
    file = directory / "sweep.json"
    try:
        values = parse_json(file.read_text())
        grid = {str(name): [str(value) for value in tried] for name, tried in values["grid"].items()}
        return Plan(str(values["against"]), grid)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{file} is missing or damaged: name the directory of a sweep, or leave --resume out"
        ) from None


def read_grid(arguments: Sequence[str]) -> Grid:
    """Group what is typed after each flag: --learning-rate 1e-3 2e-3 --prediction eps v.

    Raises:
        InputError: a value comes before any flag, a flag has none or one twice, or decides which images are seen.
    """
    grid: dict[str, list[str]] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("_", "-")
            if name in grid:
                raise InputError(f"--{name} is named twice: name it once, with all its values")
            grid[name] = [value] if equals else []
        elif not name:
            raise InputError(f"{argument} stands before any flag: name the flag that it is a value of")
        else:
            grid[name].append(argument)
    for name, values in grid.items():
        if name in NOT_SWEPT:
            raise InputError(f"--{name} decides which images and noise are seen: only runs of the same are compared")
        if not values:
            raise InputError(f"--{name} has no value to try: name one or more (true false for a switch)")
        if len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(values)} names a value twice")
    return grid


def _name(pairs: Sequence[tuple[str, str]]) -> str:
    name = ",".join(f"{name}={value}" for name, value in pairs).replace("/", "-")
    long = len(name.encode()) > LONGEST_NAME
    return f"{name[: LONGEST_NAME // 4]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}" if long else name


def _arguments(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return flags as train takes them: a switch without a value, a list's numbers one by one."""
    switches = {"true": "--", "false": "--no-"}
    arguments: list[str] = []
    for name, value in pairs:
        arguments += [switches[value] + name] if value in switches else [f"--{name}", *value.split(",")]
    return arguments


def verdict_of(run: Path) -> str | None:
    """Return the verdict of a run that has come to its end, or None."""
    try:
        return str(parse_json((run / "verdict.json").read_text())["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def failed(run: Path) -> None:
    """Keep that a run cannot be trained: its mathematics is wrong, or a value was not finite."""
    replace_file(run / "verdict.json", (json.dumps({"verdict": FAILED}) + "\n").encode())


def _rank(last: Difference | None) -> tuple[bool, float]:
    """Return what runs are sorted by: their difference in percent, and behind all those that have none."""
    share = last.mean / last.base if last is not None else math.nan
    return math.isnan(share), share


def ranking(base: RecordedRun, runs: Sequence[RecordedRun]) -> list[str]:
    """Return a table of a sweep's runs as lines, the best difference from the base first."""
    last = {run.path: found[-1] for run in runs if (found := differences(base, run))}
    width = max(len(run.path.name) for run in runs)
    lines = [f"{'run':<{width}}     step      loss  difference  sigma  verdict     images/s"]
    for run in sorted(runs, key=lambda run: _rank(last.get(run.path))):
        one, rate = last.get(run.path), run.images_per_s
        figures = (
            " " * 37
            if one is None
            else (f"{one.step:9,}{one.other:10.5f}{one.mean / one.base:+12.2%}{one.sigmas:+7.1f}")
        )
        verdict = verdict_of(run.path) or "unfinished"
        lines.append(f"{run.path.name:<{width}}{figures}  {verdict:<10}{'' if rate is None else f'{rate:10,.0f}'}")
    return lines
