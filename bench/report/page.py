"""The report as a page: Markdown tables from report.json.

    python -m bench.report.page DIR

writes DIR's report.md and plots again from its report.json.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.report import sections
from bench.report.tables import duration, number, table
from bench.report.workbench import Row

NAME = "report.md"
PLOTS = {
    "parts.png": "Where the time of a step goes",
    "roofline.png": "What is reached of the device's limits",
    "loops.png": "The alternatives of the loop",
    "peers.png": "The peers, side by side",
    "scaling.png": "Scaling in batch, steps and image size",
}
"""Files that `plots` draws, with what they show."""


def group(report: Row, name: str) -> list[Row]:
    """Return the rows of a group's measurements, in the order of measuring."""
    entries = report["measurements"].values()
    return [row for entry in entries if entry["group"] == name for row in entry.get("rows", ())]


def _loads(report: Row) -> str:
    """Return between what the machine's load lay: beyond what is measured, it is others' work, which slows figures."""
    loads = [entry["load"] for entry in report["measurements"].values()]
    return f"{min(loads)} to {max(loads)}" if loads else "none yet"


def _found(rows: list[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def _headline(report: Row) -> list[str]:
    """Return the three figures that a reader looks for, beside how much longer each peer takes."""
    top = report.get("headline")
    if top is None:
        return []
    ours = {"configuration": top["configuration"], "variant": top["variant"]}
    peers = [row for row in group(report, "peers") if "times_as_long" in row and row["name"] != row["ours"]]
    names = list(dict.fromkeys(row["name"] for row in peers))
    body = []
    for kind, batch in (("sampling", top["many"]), ("sampling", top["one"]), ("train", top["training"])):
        row = _found(group(report, "training" if kind == "train" else "loops"), **ours, images=batch)
        if row is None:
            continue
        step = row["seconds_per_step"]["median"]
        if kind == "train":
            figure = f"{number(batch / step)} images/s"
        elif batch == top["one"]:
            figure = f"{duration(step * top['timesteps'] / batch)} an image"
        else:
            figure = f"{number(batch / step / top['timesteps'])} images/s"
        found = [
            _found(peers, kind=kind, configuration=top["configuration"], images=batch, name=name) for name in names
        ]
        ratios = [f"{peer['times_as_long']['median']:.2f} times as long" if peer else "-" for peer in found]
        body.append([f"{'training' if kind == 'train' else kind}, batch {batch}", figure, *ratios])
    if not body:
        return []
    text = f"{top['configuration']}, {top['variant']}; sampling is the paper's, all {top['timesteps']} steps."
    return [text, "", *table(["", "ddpm-fast", *names], body)]


def _head(report: Row) -> list[str]:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# {machine['device']}",
        "",
        *_headline(report),
        f"Measured {report['date']} at commit {report['commit']} (sources {report['sources']}), "
        f"U-Net in {report['dtype']}, on {machine['host']} with {machine['cores']} cores, {machine['system']}; "
        + versions
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
    writers: list[tuple[str, Callable[[list[Row]], list[str]]]] = [
        ("ceilings", sections.ceilings),
        ("agreement", sections.agreement),
        ("peers", sections.peers),
        ("loops", lambda rows: sections.scenarios("Sampling", rows, "one step")),
        ("training", lambda rows: sections.scenarios("Training", rows, "one step")),
        ("parts", sections.parts),
        ("ops", sections.ops),
        ("first step", sections.first_steps),
        ("scaling", sections.scaling),
    ]
    lines = _head(report)
    for name, write in writers:
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
    from bench.report.plots import draw_plots  # matplotlib takes a second, and a cut-off visit may have none

    report = json.loads((folder / "report.json").read_text())
    draw_plots(folder, report)
    write_page(folder, report)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
