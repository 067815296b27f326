"""One command for a visit to a machine: measure what the minutes allow, in order of importance, and write the page.

    python -m bench.report --minutes 9 --out DIR

DIR gets report.json and report.md after every measurement, so that a visit that is cut off leaves what it has, and
plots at the end. The same command again, on the same device and sources, keeps what is there and measures what was
left out or failed; after a change to the engine it starts anew.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import measurements
from bench.machine import commit, folder_name, machine
from bench.page import write_page
from bench.peers import one_line
from bench.plan import plan
from bench.plots import draw_plots
from bench.visit import Budget, Measurement, Visit
from ddpm_fast.engine.execution import choose_device

PAGE_SECONDS = 10.0
"""Kept back for the plots."""

Report = dict[str, Any]


def sources() -> str:
    """Return a digest of the engine's sources: figures of other sources are not mixed with new ones."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*(root / "ddpm_fast").rglob("*.py"), *(root / "kernels").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def new_report(visit: Visit) -> Report:
    """Return a report that says where and what, and holds no measurement."""
    return {
        "machine": machine(visit.device),
        "dtype": str(visit.dtype).removeprefix("torch."),
        "sources": sources(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "measurements": {},
        "left_out": [],
    }


def open_report(folder: Path, visit: Visit) -> Report:
    """Return the folder's report without its failures, or a new one where it is of another machine or other sources."""
    report = new_report(visit)
    path = folder / "report.json"
    if path.exists():
        old = json.loads(path.read_text())
        if all(old.get(key) == report[key] for key in ("machine", "dtype", "sources")):
            report["measurements"] = {k: v for k, v in old["measurements"].items() if "failed" not in v}
    if "ceilings" in report["measurements"]:
        visit.ceilings = measurements.restored(report["measurements"]["ceilings"]["rows"])
    return report


def write_report(folder: Path, report: Report) -> None:
    """Write report.json, whole or not at all, and the page without its plots."""
    temporary = folder / f".report.json.{os.getpid()}"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(folder / "report.json")
    write_page(folder, report)


def take(measurement: Measurement, estimated: float) -> dict[str, Any]:
    """Make one measurement; what it raises is its entry, so that the rest of the visit goes on."""
    start = time.monotonic()
    entry: dict[str, Any] = {"group": measurement.group, "estimated_seconds": round(estimated, 1)}
    entry["load"] = round(os.getloadavg()[0], 1)
    try:
        entry["rows"] = measurement.run()
    except Exception as error:  # a visit costs too much to end at the first failure
        entry["failed"] = one_line(error)
    entry["took_seconds"] = round(time.monotonic() - start, 1)
    return entry


def measure_all(folder: Path, report: Report, planned: list[Measurement], budget: Budget) -> None:
    """Make the measurements that fit into the budget, in order, and write the report after each."""
    report["left_out"] = []
    estimated_so_far = took_so_far = 1.0
    for measurement in planned:
        if measurement.name in report["measurements"]:
            continue
        # A machine that was slower than estimated so far will be slower with the next one too.
        estimated = measurement.cost() * max(1.0, took_so_far / estimated_so_far)
        if estimated > budget.left():
            report["left_out"].append({"name": measurement.name, "estimated_seconds": math.ceil(estimated)})
            continue
        entry = report["measurements"][measurement.name] = take(measurement, estimated)
        estimated_so_far += estimated
        took_so_far += entry["took_seconds"]
        print(f"{measurement.name}: {entry.get('failed', 'measured')}, {entry['took_seconds']} s", flush=True)
        write_report(folder, report)
    write_report(folder, report)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Measure this machine and write its page."
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time to spend; what does not fit is left out")
    parser.add_argument("--out", type=Path, help="folder of the report (default: profiles/DEVICE)")
    parser.add_argument("--only", nargs="+", default=[], metavar="GROUP", help="measure these groups alone")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    budget = Budget(options.minutes * 60 - PAGE_SECONDS)
    visit = Visit.to(choose_device(options.device))
    folder = options.out or Path("profiles") / folder_name(visit.device)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    report = open_report(folder, visit)
    wanted = {"ceilings", *options.only}
    planned = [one for one in plan(visit) if not options.only or one.group in wanted]
    measure_all(folder, report, planned, budget)
    draw_plots(folder, report)
    write_page(folder, report)
    print(f"{folder / 'report.md'}: {len(report['measurements'])} measured, {len(report['left_out'])} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
