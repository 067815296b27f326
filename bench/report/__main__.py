"""One command for a visit to a machine: measure what the minutes allow, in order of importance, and write the page.

    python -m bench.report --minutes 9 --out DIR
    python -m bench.report --minutes 9 --dry-run --device cuda      what that would measure, told without a GPU

DIR gets report.json and report.md after every measurement, so that a visit that is cut off leaves what it has, and
plots at the end. The same command again, on the same device and sources, keeps what is there and measures what was
left out or failed; after a change to the engine it starts anew. This process plans and writes; it touches no device,
and what measures are processes of their own (`bench.report.child`).
"""

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.peers.comparison import MODULES, importable
from bench.report import measurements
from bench.report.budget import GUESSED, Budget, Costs, Measurement
from bench.report.child import ChildDiedError, Worker
from bench.report.page import write_page
from bench.report.plan import plan
from bench.report.plots import draw_plots
from bench.report.sizes import SIZES, Sizes
from bench.timing.machine import commit, folder_name
from bench.work.scenarios import CONFIGURATIONS, default_variant
from ddpm_fast.engine.execution import choose_device

PAGE_SECONDS = 10.0
"""Kept back for the plots."""
PATIENCE = 3.0
"""A measurement is ended after so many times its estimate, and a minute."""

Report = dict[str, Any]


def sources() -> str:
    """Return a digest of the engine's sources: figures of other sources are not mixed with new ones."""
    root = Path(__file__).parents[2]
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*(root / "ddpm_fast").rglob("*.py"), *(root / "kernels").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def headline(kind: str, sizes: Sizes) -> dict[str, Any]:
    """Return which measurements make the three figures at the top of the page."""
    many, one = sizes.report_sampling[0], min(sizes.report_sampling, key=lambda size: size.batch)
    return {
        "configuration": many.configuration,
        "timesteps": CONFIGURATIONS[many.configuration].diffusion.timesteps,
        "many": many.batch,
        "one": one.batch,
        "training": sizes.report_training[0].batch,
        "variant": str(default_variant(torch.device(kind))),
    }


def new_report(first_word: Report, top: Report) -> Report:
    """Return a report that says where and what, and holds no measurement."""
    return {
        **first_word,
        "sources": sources(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "headline": top,
        "measurements": {},
        "left_out": [],
    }


def identity(report: Report) -> Report:
    """Return what figures in one report must have in common; on a GPU they hardly depend on the host."""
    machine = report["machine"]
    compared = ["device", "type", "memory_gb", "cuda"] if machine["type"] == "cuda" else ["device", "host", "cores"]
    found = {key: machine.get(key) for key in compared} | {key: report.get(key) for key in ("dtype", "sources")}
    return found | {name: machine["versions"][name] for name in ("torch", "triton")} | report.get("headline", {})


def open_report(folder: Path, report: Report) -> Report:
    """Take over what the folder's report has measured, but for failures; nothing of other machines or sources."""
    path = folder / "report.json"
    if not path.exists():
        return report
    old = json.loads(path.read_text())
    if identity(old) != identity(report):
        print(f"{path} is of another machine or other sources: starting anew", flush=True)
        return report
    report["measurements"] = {k: v for k, v in old["measurements"].items() if "failed" not in v}
    versions = report["machine"]["versions"]
    for name in MODULES:  # a peer that was there the last time need not be there now
        if versions[name] == "not installed":
            versions[name] = old["machine"]["versions"][name]
    return report


def write_report(folder: Path, report: Report) -> None:
    """Write report.json, whole or not at all, and the page without its plots."""
    temporary = folder / f".report.json.{os.getpid()}"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(folder / "report.json")
    write_page(folder, report)


def take(measurement: Measurement, estimated: float, costs: Costs, budget: Budget, worker: Worker) -> Report:
    """Have one measurement made, and return its entry."""
    start = time.monotonic()
    entry: Report = {"group": measurement.group, "estimated_seconds": round(estimated, 1)}
    entry["load"] = round(os.getloadavg()[0], 1)
    patience = min(budget.left(), PATIENCE * estimated + 60)
    entry |= worker.measure(measurement, costs.ceilings, patience)
    entry["took_seconds"] = round(time.monotonic() - start, 1)
    return entry


def measure_all(
    folder: Path, report: Report, planned: list[Measurement], costs: Costs, budget: Budget, worker: Worker
) -> None:
    """Make the measurements that fit into the budget, in order, and write the report after each."""
    report["left_out"] = []
    estimated_so_far = took_so_far = 1.0
    for measurement in planned:
        known = report["measurements"].get(measurement.name)
        if known is None:
            # A machine that was slower than estimated so far will be slower with the next one too.
            estimated = costs.of(measurement) * max(1.0, took_so_far / estimated_so_far)
            if estimated > budget.left():
                report["left_out"].append({"name": measurement.name, "estimated_seconds": math.ceil(estimated)})
                continue
            known = report["measurements"][measurement.name] = take(measurement, estimated, costs, budget, worker)
            failed = known.get("failed")
            costs.made(measurement, failed=failed is not None)
            if failed and budget.left() <= 0:  # cut off, which is nobody's failure
                del report["measurements"][measurement.name]
                report["left_out"].append({"name": measurement.name, "estimated_seconds": math.ceil(estimated)})
            elif failed is None:
                estimated_so_far += estimated
                took_so_far += known["took_seconds"]
            print(f"{measurement.name}: {failed or 'measured'}, {known['took_seconds']} s", flush=True)
            write_report(folder, report)
        if measurement.name == "ceilings" and "rows" in known:
            costs.ceilings = measurements.restored(known["rows"])
    write_report(folder, report)


def scheduled(planned: list[Measurement], costs: Costs, seconds: float) -> Iterator[tuple[Measurement, float, float]]:
    """Yield each measurement with its estimate and the seconds spent after it, both as they stand in its turn.

    What does not fit is passed by, as in earnest: the seconds spent are then those before it.
    """
    spent = 0.0
    for measurement in planned:
        estimated = costs.of(measurement)
        if spent + estimated <= seconds:
            spent += estimated
            costs.made(measurement)
        yield measurement, estimated, spent


def print_plan(planned: list[Measurement], costs: Costs, seconds: float) -> None:
    """Print what would be measured in so many seconds, with all costs as they are estimated."""
    guess = costs.ceilings or GUESSED[costs.kind]
    print(
        f"{seconds:.0f} s to measure in; guessed, not measured: a copy at {guess.copy_gb_per_s:.0f} GB/s, "
        f"matrix products at {guess.matrix_tflop_per_s:g} TFLOP/s"
    )
    print(f"{'seconds':>8} {'in all':>7}  measurement")
    before = 0.0
    for measurement, estimated, spent in scheduled(planned, costs, seconds):
        in_all = f"{spent:7.0f}" if spent > before else "      -"
        print(f"{estimated:8.0f} {in_all}  {measurement.name}{'' if spent > before else ' (does not fit)'}")
        before = spent


def failures(report: Report) -> list[str]:
    """Return a line for everything that failed: measurements, and loops that do not agree."""
    found = [f"{name}: {entry['failed']}" for name, entry in report["measurements"].items() if "failed" in entry]
    for name, entry in report["measurements"].items():
        rows = entry.get("rows", ())
        found += [f"{name}: {row['variant']} makes other images" for row in rows if not row.get("agrees", True)]
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Measure this machine and write its page."
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time to spend; what does not fit is left out")
    parser.add_argument("--out", type=Path, help="folder of the report (default: profiles/DEVICE)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="START", help="measure what begins so alone, e.g. ops peers-compiled"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--sizes", choices=SIZES, help="what is measured (default: the device's); tiny is a trial")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, without what --out holds, and stop")
    return parser.parse_args(arguments)


def choose(planned: list[Measurement], only: list[str]) -> list[Measurement]:
    """Return the measurements whose names begin as asked for, with the ceilings that they are held against."""
    return [one for one in planned if one.name.startswith(("ceilings", *only))] if only else planned


def dry_run(options: argparse.Namespace, planned: list[Measurement], costs: Costs, seconds: float) -> None:
    """Print the plan without what the folder of the report holds."""
    path = options.out / "report.json" if options.out else None
    if path and path.exists():
        measured = json.loads(path.read_text())["measurements"]
        planned = [one for one in planned if "rows" not in measured.get(one.name, ())]
    print_plan(planned, costs, seconds)


def measure(options: argparse.Namespace, kind: str, costs: Costs, budget: Budget) -> tuple[Path, Report]:
    """Measure what fits; return the folder and its report.

    Raises:
        ChildDiedError: no measuring process starts.
    """
    worker, packages = Worker([kind, options.sizes or kind]), importable()
    try:
        report = new_report(worker.first_word(), headline(kind, costs.sizes))  # while packages are tried
        worker.packages = packages()
        planned = choose(plan(kind, costs.sizes, worker.packages), options.only)
        folder = options.out or Path("profiles") / folder_name(report["machine"])
        folder.mkdir(parents=True, exist_ok=True)
        report = open_report(folder, report)
        measure_all(folder, report, planned, costs, budget, worker)
    finally:
        worker.close()
    return folder, report


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where something failed, 2 where nothing could be measured."""
    options = parse(arguments)
    budget = Budget(options.minutes * 60 - PAGE_SECONDS)
    kind = choose_device(options.device).type
    sizes = SIZES[options.sizes or kind]
    costs = Costs(kind, sizes)
    if options.dry_run:
        dry_run(options, choose(plan(kind, sizes, importable()()), options.only), costs, budget.seconds)
        return 0
    if kind == "cuda" and not torch.cuda.is_available():
        print("--device cuda: there is no NVIDIA GPU here; --device cpu measures the CPU", file=sys.stderr)
        return 2
    try:
        folder, report = measure(options, kind, costs, budget)
    except ChildDiedError as error:
        print(f"nothing can be measured here: {error}", file=sys.stderr)
        return 2
    draw_plots(folder, report)
    write_page(folder, report)
    failed = failures(report)
    print(*(f"FAILED {line}" for line in failed), sep="\n", end="\n" if failed else "")
    counts = f"{len(report['measurements']) - len(failed)} measured, {len(failed)} failed"
    print(f"{folder / 'report.md'}: {counts}, {len(report['left_out'])} left out")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the measuring process is ended too
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head`
    sys.exit(main())
