"""profiles/launches-sm90.json and .md: what each step launched, a column per state of the engine."""

import json
from pathlib import Path
from typing import Any

from bench.launches.kinds import total

Columns = list[dict[str, Any]]
"""Oldest first: label, commit, date, and what `scenario.observe` found by name of the scenario."""

INTRODUCTION = """# What a step launches on an H100

Seen on a machine without a GPU: `python -m bench.launches` (its docstring says what is real there). Launches are those
of one captured step; a call of cuDNN or cuBLAS counts as one. MB are each input and each output of a launch once, as
Inductor or the caller counts them, in 10^6 bytes: a lower bound of what moves. Nothing here is a time, and no value was
computed. In every scenario nothing was refused while capturing, and replaying waited for nothing, unless a line says
otherwise.
"""


def read(path: Path) -> Columns:
    """Return the columns kept so far."""
    return json.loads(path.read_text())["columns"] if path.exists() else []


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(head), _row(["---"] + ["---:"] * (len(head) - 1)), *map(_row, rows)]


def _cells(found: dict[str, int] | None) -> list[str]:
    if found is None:
        return ["", ""]
    return [str(found["launches"]), f"{found['bytes'] / 1e6:,.1f}"]


def _head(columns: Columns, first: str) -> list[str]:
    return [first, *(f"{column['label']}: {what}" for column in columns for what in ("launches", "MB"))]


def _faults(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["refused"]:
        lines.append(f"refused while capturing: {', '.join(sorted(set(found['refused'])))}")
    if found["waits"]:
        lines.append(f"waits in replay: {', '.join(sorted(set(found['waits'])))}")
    if found["atomics"]:
        lines.append(f"launches that add atomically, in any order: {len(found['atomics'])}")
    return lines


def _scenario(name: str, columns: Columns) -> list[str]:
    found = [column["scenarios"].get(name) for column in columns]
    kinds = {kind for one in found if one for kind in one["kinds"]}
    newest = next(one for one in reversed(found) if one)["kinds"]
    ordered = sorted(kinds, key=lambda kind: (-newest.get(kind, {"bytes": 0})["bytes"], kind))
    rows = [
        [kind, *(cell for one in found for cell in _cells(one["kinds"].get(kind) if one else None))] for kind in ordered
    ]
    faults = [
        f"{column['label']}: {line}."
        for column, one in zip(columns, found, strict=True)
        if one
        for line in _faults(one)
    ]
    return ["", f"## {name}", "", *_table(_head(columns, "kind"), rows), *([""] if faults else []), *faults]


def write(folder: Path, columns: Columns) -> None:
    """Write both files into a folder."""
    (folder / "launches-sm90.json").write_text(json.dumps({"columns": columns}, indent=1) + "\n")
    names = list(columns[-1]["scenarios"])
    rows = [
        [
            name,
            *(
                cell
                for c in columns
                for cell in _cells(total(c["scenarios"][name]["kinds"]) if name in c["scenarios"] else None)
            ),
        ]
        for name in names
    ]
    states = [f"- {column['label']}: {column['commit']}, {column['date']}" for column in columns]
    lines = [INTRODUCTION, *states, "", *_table(_head(columns, "a step of"), rows)]
    for name in names:
        lines += _scenario(name, columns)
    (folder / "launches-sm90.md").write_text("\n".join(lines) + "\n")
