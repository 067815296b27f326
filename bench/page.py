"""The report as a page: Markdown tables from report.json.

    python -m bench.page DIR

writes DIR's report.md and plots again from its report.json.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.visit import Row

NAME = "report.md"
PLOTS = {
    "parts.png": "Where the time of a step goes",
    "roofline.png": "What is reached of the device's limits",
    "loops.png": "The alternatives of the loop",
    "peers.png": "The peers, side by side",
    "scaling.png": "Scaling in batch, steps and image size",
}
"""Files that `plots` draws, with what they show."""


def duration(seconds: float) -> str:
    """Return seconds in the unit that reads best, three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def with_spread(samples: Row, form: Callable[[float], str] = duration) -> str:
    """Return a median with its quartiles."""
    return f"{form(samples['median'])} ({form(samples['low'])} to {form(samples['high'])})"


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def share(value: float | None) -> str:
    """Return a share as a percentage."""
    return "-" if value is None else f"{value:.0%}"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, followed by an empty one."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def group(report: Row, name: str) -> list[Row]:
    """Return the rows of a group's measurements, in the order of measuring."""
    entries = report["measurements"].values()
    return [row for entry in entries if entry["group"] == name for row in entry.get("rows", ())]


def _loads(report: Row) -> str:
    """Return between what the machine's load lay: beyond what is measured, it is others' work, which slows figures."""
    loads = [entry["load"] for entry in report["measurements"].values()]
    return f"{min(loads)} to {max(loads)}" if loads else "none yet"


def _head(report: Row) -> list[str]:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# {machine['device']}",
        "",
        f"Measured {report['date']} at commit {report['commit']}, U-Net in {report['dtype']}, "
        f"on {machine['host']} with {machine['cores']} cores, {machine['system']}; {versions}"
        + (f"; CUDA {machine['cuda']}, {machine['memory_gb']} GB" if machine["type"] == "cuda" else "")
        + ".",
        "",
        f"Load average before each measurement: {_loads(report)}. "
        "Times are medians over n rounds after warm-up, with the first and the third quartile in brackets. "
        + (
            "They are taken by events on the device; short ops as replays of a CUDA graph."
            if machine["type"] == "cuda"
            else "No GPU: everything runs the plain PyTorch reference on the CPU."
        ),
        "",
    ]
    return lines


def _ceilings(rows: list[Row]) -> list[str]:
    body = [
        [r["what"], f"{with_spread(r['rate'], lambda v: f'{v:.4g}')} {r['unit']}", str(r["rate"]["n"])] for r in rows
    ]
    text = "Shares below are of these. A copy counts bytes read and written; a multiply and an add are 2 FLOPs."
    return ["## The two ceilings", "", text, "", *table(["", "median", "n"], body)]


def _scenarios(title: str, rows: list[Row], what: str) -> list[str]:
    head = ["network", "batch", "steps", "variant", what, "n", "images/s", "TFLOP/s", "of the matrix rate"]
    head += ["peak memory", "J an image", "first call"]
    body = [
        [
            r["configuration"],
            str(r["images"]),
            str(r["steps"]),
            r["variant"],
            with_spread(r["seconds_per_step"]),
            str(r["seconds"]["n"]),
            number(r["images_per_s"]),
            number(r["tflop_per_s"]),
            share(r.get("share_of_matrix_rate")),
            f"{number(r['peak_gb'])} GB",
            number(r["joules_per_image"]),
            duration(r["first_call_seconds"]),
        ]
        for r in rows
    ]
    reason = next((r["energy"] for r in rows if r["energy"]), "")
    notes = [f"Energy is not measured: {reason}.", ""] if reason else []
    return [f"## {title}", "", *table(head, body), *notes]


def _ops(rows: list[Row]) -> list[str]:
    reference = {(r["op"], r["shape"]): r["seconds"]["median"] for r in rows if r["form"] == "reference"}
    head = ["op", "shape", "times a step", "form", "one call", "n", "GB/s", "of the copy rate", "against the reference"]
    body = []
    for r in rows:
        base = reference.get((r["op"], r["shape"]))
        faster = "-" if base is None or r["form"] == "reference" else f"{base / r['seconds']['median']:.2f}x as fast"
        timed = [with_spread(r["seconds"]), str(r["seconds"]["n"]), number(r["gb_per_s"])]
        timed += [share(r.get("share_of_copy_rate")), faster]
        body.append([r["op"], r["shape"], str(r["a_step"]), r["form"], *timed])
    text = "GB/s count the least that an op must move: each input read once, each output written once."
    return ["## Ops at the U-Net's shapes", "", text, "", *table(head, body)]


def _parts(rows: list[Row]) -> list[str]:
    lines = ["## Where the time of a step goes", ""]
    for r in rows:
        total = sum(r["parts"].values())
        body = [[part, duration(seconds), share(seconds / total)] for part, seconds in r["parts"].items()]
        lines += [f"{r['what']}: {duration(total)}", "", *table(["part", "time", "share"], body)]
    return lines


def _peers(rows: list[Row]) -> list[str]:
    text = (
        "Timed in turns, in one process, which keeps freed memory for all of them as the engine does for itself; "
        "ratios are taken round by round."
    )
    lines = ["## Side by side", "", text, ""]
    starts = [i for i, row in enumerate(rows) if row["name"] == row["ours"]]  # each comparison begins with ours
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        body = []
        for r in rows[start:end]:
            if "reason" in r:
                body.append([r["name"], r["runs"], f"did not run: {r['reason']}", "-", "-", "-"])
                continue
            times = with_spread(r["times_as_long"], lambda v: f"{v:.2f}")
            speed = number(r["images"] / r["seconds"]["median"])
            body.append([r["name"], r["runs"], with_spread(r["seconds"]), speed, times, str(r["seconds"]["n"])])
        what = rows[start]["what"]
        head = ["", "runs", "one call", "images/s", "times as long as ddpm-fast", "n"]
        lines += [f"### {what[:1].upper()}{what[1:]}", "", *table(head, body)]
    return lines


def _first_steps(rows: list[Row]) -> list[str]:
    text = "From starting Python to the first step's end: cold with empty compile caches, warm with what that left."
    keys = ("cold_seconds", "warm_seconds", "cold_step_seconds", "warm_step_seconds")
    body = [[r["what"], *(duration(r[key]) for key in keys)] for r in rows]
    head = ["", "cold", "warm", "of it building and the step, cold", "warm"]
    return ["## The first step", "", text, "", *table(head, body)]


def _scaling(rows: list[Row]) -> list[str]:
    head = ["over", "value", "network", "batch", "steps", "one step", "n", "images/s", "peak memory"]
    body = [
        [
            r["over"],
            str(r["value"]),
            r["configuration"],
            str(r["images"]),
            str(r["steps"]),
            with_spread(r["seconds_per_step"]),
            str(r["seconds"]["n"]),
            number(r["images_per_s"]),
            f"{number(r['peak_gb'])} GB",
        ]
        for r in rows
    ]
    return ["## Scaling", "", *table(head, body)]


def _missing(report: Row) -> list[str]:
    failed = [(name, entry["failed"]) for name, entry in report["measurements"].items() if "failed" in entry]
    lines = []
    if failed:
        lines += ["## Failed", "", *(f"- {name}: {reason}" for name, reason in failed), ""]
    if report["left_out"]:
        left = (f"- {one['name']}: about {one['estimated_seconds']} s" for one in report["left_out"])
        lines += ["## Left out for lack of time", "", *left, ""]
    return lines


def page(report: Row, plots: Iterable[str] = ()) -> str:
    """Return the page's Markdown; only sections that have rows, and the plots that exist."""
    sections: list[tuple[str, Callable[[list[Row]], list[str]]]] = [
        ("ceilings", _ceilings),
        ("peers", _peers),
        ("loops", lambda rows: _scenarios("Sampling", rows, "one step")),
        ("training", lambda rows: _scenarios("Training", rows, "one step")),
        ("parts", _parts),
        ("ops", _ops),
        ("first step", _first_steps),
        ("scaling", _scaling),
    ]
    lines = _head(report)
    for name, write in sections:
        if rows := group(report, name):
            lines += write(rows)
    lines += _missing(report)
    lines += [line for name in plots for line in (f"## {PLOTS[name]}", "", f"![{PLOTS[name]}]({name})", "")]
    return "\n".join(lines)


def write_page(folder: Path, report: dict[str, Any]) -> None:
    """Write the page beside the plots that the folder has."""
    (folder / NAME).write_text(page(report, [name for name in PLOTS if (folder / name).exists()]))


def main(folder: Path) -> None:
    """Write a folder's page and plots again."""
    from bench.plots import draw_plots  # matplotlib takes a second, and a cut-off visit may have none

    report = json.loads((folder / "report.json").read_text())
    draw_plots(folder, report)
    write_page(folder, report)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
