"""The sections of the report's page, each from the rows of one group of measurements."""

from typing import Any

from bench.report.tables import duration, number, share, table, with_spread
from bench.report.workbench import Row


def ceilings(rows: list[Row]) -> list[str]:
    """Say what this machine can reach."""
    body = [
        [r["what"], f"{with_spread(r['rate'], lambda v: f'{v:.4g}')} {r['unit']}", str(r["rate"]["n"])] for r in rows
    ]
    text = "Shares below are of these. A copy counts bytes read and written; a multiply and an add are 2 FLOPs."
    return ["## The two ceilings", "", text, "", *table(["", "median", "n"], body)]


def agreement(rows: list[Row]) -> list[str]:
    """Say how far the loops' images are from the eager reference's."""
    text = (
        "Images of the same seed, by weights that were drawn at random, as the norm of the difference over the norm. "
        "Rounding alone is the reference in a higher precision; twice that is allowed."
    )
    body = [
        [
            f"{r['variant']}, {r['dtype']}, {r['configuration']}, batch {r['images']}, {r['steps']} steps",
            f"{r['difference']:.1e}",
            f"{r['largest']:.1e}",
            f"{r['rounding']:.1e}",
            "yes" if r["agrees"] else "**no**",
            "passed" if r["own_check"] else "-",
        ]
        for r in rows
    ]
    head = ["against the eager reference", "difference", "largest of a pixel", "rounding alone", "agrees"]
    return ["## Do all loops make the same images", "", text, "", *table([*head, "the loop's own check"], body)]


def scenarios(title: str, rows: list[Row], what: str) -> list[str]:
    """Show training steps or sampling loops, with all that was measured of them."""
    head = ["network", "batch", "steps", "variant", what, "n", "images/s", "TFLOP/s", "of the matrix rate"]
    head += ["peak memory", "while building", "J an image", "first call"]
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
            f"{number(r.get('build_peak_gb'))} GB",
            number(r["joules_per_image"]),
            duration(r["first_call_seconds"]),
        ]
        for r in rows
    ]
    reason = next((r["energy"] for r in rows if r["energy"]), "")
    notes = [f"Energy is not measured: {reason}.", ""] if reason else []
    return [f"## {title}", "", *table(head, body), *notes]


def ops(rows: list[Row]) -> list[str]:
    """Show each op in all its forms."""
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


def _kernels(heaviest: list[list[Any]]) -> str:
    """Return a part's heaviest kernels in a table's cell."""
    texts = (f"`{name.replace('|', '/')[:90]}` {duration(seconds)} in {runs:.3g}" for name, seconds, runs in heaviest)
    return "<br>".join(texts) or "-"


def parts(rows: list[Row]) -> list[str]:
    """Divide a step into parts, and name the kernels that take the time."""
    text = "Beside each part its heaviest kernels (on a CPU: operators), with the time of all their runs in a step."
    lines = ["## Where the time of a step goes", "", text, ""]
    for r in rows:
        total = sum(r["parts"].values())
        body = [
            [part, duration(seconds), share(seconds / total), _kernels(r.get("heaviest", {}).get(part, []))]
            for part, seconds in r["parts"].items()
        ]
        head = ["part", "time", "share", "heaviest kernels, with their time and runs"]
        lines += [f"{r['what']}: {duration(total)}", "", *table(head, body)]
    return lines


def peers(rows: list[Row]) -> list[str]:
    """Show the comparisons, a table each."""
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


def first_steps(rows: list[Row]) -> list[str]:
    """Say how long a user waits for the first step."""
    text = "From starting Python to the first step's end: cold with empty compile caches, warm with what that left."
    keys = ("cold_seconds", "warm_seconds", "cold_step_seconds", "warm_step_seconds")
    body = [[r["what"], *(duration(r[key]) for key in keys)] for r in rows]
    head = ["", "cold", "warm", "of it building and the step, cold", "warm"]
    return ["## The first step", "", text, "", *table(head, body)]


def scaling(rows: list[Row]) -> list[str]:
    """Show how time grows with batch, steps and image size."""
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
