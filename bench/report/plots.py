"""The report's plots, from report.json's rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.page import group
from bench.report.workbench import Row

OURS, THEIRS, LIMIT = "#1f5fa8", "#b0b7c3", "#c0392b"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def draw_parts(rows: list[Row]) -> Figure:
    """One bar a step, divided into parts."""
    figure, (axis,) = _figure(9, 1.6 + 0.7 * len(rows))
    names = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    left = [0.0] * len(rows)
    for name, colour in zip(names, plt.get_cmap("tab20").colors, strict=False):  # pyright: ignore[reportAttributeAccessIssue]
        shares = [row["parts"].get(name, 0.0) / sum(row["parts"].values()) for row in rows]
        axis.barh(range(len(rows)), shares, left=left, color=colour, label=name)
        for i, part in enumerate(shares):
            if part >= 0.05:
                axis.text(left[i] + part / 2, i, f"{part:.0%}", ha="center", va="center", fontsize=8)
            left[i] += part
    axis.set_yticks(range(len(rows)), [row["what"].replace(", ", "\n", 1) for row in rows], fontsize=8)
    axis.set_xlabel("share of the step's time")
    axis.set_xlim(0, 1)
    axis.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def draw_roofline(ceilings: list[Row], loops: list[Row], ops: list[Row]) -> Figure:
    """Arithmetic rate over arithmetic intensity, below what memory and the matrix units allow."""
    figure, (axis,) = _figure(7.5, 5)
    copied, multiplied = (row["rate"]["median"] for row in ceilings)  # GB/s, TFLOP/s
    ridge = multiplied * 1e3 / copied
    corners = [0.5, ridge, 20 * max([ridge, *(row["flop"] / row["moved"] for row in loops)])]
    axis.loglog(corners, [min(multiplied, x * copied / 1e3) for x in corners], color=LIMIT, linewidth=1.5)
    axis.text(corners[-1], multiplied * 1.15, f"matrix product: {multiplied:.3g}", color=LIMIT, ha="right", fontsize=8)
    axis.text(corners[0], copied / 1e3, f"copy: {copied:.3g} GB/s", color=LIMIT, fontsize=8)
    for row in loops:
        kind = "o" if row["steps"] > 1 else "s"
        x, y = row["flop"] / row["moved"], row["tflop_per_s"]
        axis.plot(x, y, kind, color=OURS, markersize=6)
        label = f"{row['configuration']}, batch {row['images']}"
        axis.annotate(label, (x, y), xytext=(6, 0), textcoords="offset points", fontsize=6, va="center")
    for row in ops:
        x, y = row["operations"] / row["moved"], row["operations"] / row["seconds"]["median"] / 1e12
        axis.plot(x, y, "^", color="#d68910" if row["form"] == "reference" else "#1e8449", markersize=4)
    axis.plot([], [], "o", color=OURS, label="sampling loop")
    axis.plot([], [], "s", color=OURS, label="train step")
    axis.plot([], [], "^", color="#d68910", label="op, plain PyTorch")
    if any(row["form"] == "kernel" for row in ops):
        axis.plot([], [], "^", color="#1e8449", label="op, kernel or compiled")
    axis.set_xlabel("operations a byte (least bytes; elementwise operations counted by hand)")
    axis.set_ylabel("10¹² operations per second")
    axis.legend(fontsize=8, frameon=False)
    return figure


def draw_loops(rows: list[Row]) -> Figure:
    """Milliseconds per step of every variant, with the quartiles."""
    figure, (axis,) = _figure(8, 1.2 + 0.35 * len(rows))
    medians = [row["seconds_per_step"]["median"] * 1e3 for row in rows]
    spread = [
        [m - row["seconds_per_step"]["low"] * 1e3 for m, row in zip(medians, rows, strict=True)],
        [row["seconds_per_step"]["high"] * 1e3 - m for m, row in zip(medians, rows, strict=True)],
    ]
    axis.barh(range(len(rows)), medians, xerr=spread, color=OURS, error_kw={"linewidth": 1})
    labels = [f"{row['configuration']}, batch {row['images']}, {row['variant']}" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("milliseconds a sampling step (median, quartiles)")
    return figure


def draw_peers(rows: list[Row]) -> Figure:
    """How many times as long each peer takes."""
    shown = [row for row in rows if "times_as_long" in row]
    figure, (axis,) = _figure(8.5, 1.2 + 0.28 * len(shown))
    values = [row["times_as_long"]["median"] for row in shown]
    low = [v - row["times_as_long"]["low"] for v, row in zip(values, shown, strict=True)]
    high = [row["times_as_long"]["high"] - v for v, row in zip(values, shown, strict=True)]
    colours = [OURS if row["name"] == row["ours"] else THEIRS for row in shown]
    bars = axis.barh(range(len(shown)), values, xerr=[low, high], color=colours, error_kw={"linewidth": 1})
    axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7, padding=12)
    axis.set_yticks(range(len(shown)), [f"{row['what']}: {row['name']}" for row in shown], fontsize=7)
    axis.axvline(1, color=OURS, linewidth=0.8, linestyle=":")
    axis.invert_yaxis()
    axis.set_xlabel("times as long as ddpm-fast (median, quartiles of the rounds)")
    return figure


def draw_scaling(rows: list[Row]) -> Figure:
    """Seconds over batch and image size a step, and over steps in all."""
    kinds = list(dict.fromkeys(row["over"] for row in rows))
    figure, axes = _figure(3.6 * len(kinds), 3.4, len(kinds))
    for axis, over in zip(axes, kinds, strict=True):
        shown = sorted((row for row in rows if row["over"] == over), key=lambda row: row["value"])
        key = "seconds" if over == "steps" else "seconds_per_step"
        values, medians = [row["value"] for row in shown], [row[key]["median"] for row in shown]
        axis.loglog(values, medians, "o-", color=OURS)
        axis.fill_between(
            values, [row[key]["low"] for row in shown], [row[key]["high"] for row in shown], color=OURS, alpha=0.2
        )
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set_xlabel({"batch": "images per batch", "image side": "image side, pixels"}.get(over, over))
        axis.set_ylabel("seconds in all" if over == "steps" else "seconds per step")
    return figure


def draw_plots(folder: Path, report: dict[str, Any]) -> None:
    """Draw what the report has figures for into its folder."""
    rows = {name: group(report, name) for name in ("ceilings", "parts", "loops", "training", "ops", "peers", "scaling")}
    drawings: dict[str, tuple[bool, Callable[[], Figure]]] = {
        "parts.png": (bool(rows["parts"]), lambda: draw_parts(rows["parts"])),
        "roofline.png": (
            bool(rows["ceilings"]),
            lambda: draw_roofline(rows["ceilings"], rows["loops"] + rows["training"], rows["ops"]),
        ),
        "loops.png": (bool(rows["loops"]), lambda: draw_loops(rows["loops"])),
        "peers.png": (bool(rows["peers"]), lambda: draw_peers(rows["peers"])),
        "scaling.png": (bool(rows["scaling"]), lambda: draw_scaling(rows["scaling"])),
    }
    for name, (has_figures, draw) in drawings.items():
        if has_figures:
            figure = draw()
            figure.savefig(folder / name, dpi=130)
            plt.close(figure)
