"""What the report measures, one function a kind of figure: each takes the workbench and returns rows of a table."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.peers.comparison import OURS, compare, peers_on
from bench.report.sizes import Sampling, Training
from bench.report.workbench import Row, Workbench
from bench.timing.clock import Clock, interleave, measure, warm_up
from bench.work.figures import Ceilings, copy_rate, matrix_rate, rates, scenario_figures
from bench.work.first_step import Kind, time_first_step
from bench.work.ops import builders, forms
from bench.work.parts import labelled_ops, time_by_part
from bench.work.scenarios import (
    CONFIGURATIONS,
    Scenario,
    Variant,
    default_variant,
    sampling,
    train_step,
    warm_up_calls,
    with_image_size,
)

OP_WARM_UP = 3
"""Calls of an op before it is timed: compiling, and what capturing needs."""


@dataclass(frozen=True)
class Prepared:
    """A scenario that is ready to be timed."""

    scenario: Scenario
    first_call_seconds: float
    build_peak: int | None
    """Bytes that building, compiling and capturing it took at the most; from here on the peak counts anew."""


def prepare(build: Callable[[], Scenario], variant: Variant, clock: Clock) -> Prepared:
    """Build a scenario and warm it up."""
    clock.start_afresh()
    scenario = build()
    first = warm_up(scenario.work, clock, warm_up_calls(variant, scenario.training))
    peak = clock.peak_bytes()
    clock.return_memory()
    clock.forget_peak()
    return Prepared(scenario, first, peak)


def ceilings(workbench: Workbench) -> list[Row]:
    """Measure the two ceilings and leave them with the workbench."""
    copied = copy_rate(workbench.clock, workbench.sizes.seconds / 2, workbench.sizes.copy_megabytes)
    multiplied = matrix_rate(workbench.clock, workbench.sizes.seconds / 2, workbench.dtype, workbench.sizes.matrix_side)
    dtype = str(workbench.dtype).removeprefix("torch.")
    side = workbench.sizes.matrix_side
    rows: list[Row] = [
        {"what": f"copy of {workbench.sizes.copy_megabytes} MiB", "unit": "GB/s", "rate": copied.to_json()},
        {"what": f"{dtype} matrix product, {side} cubed", "unit": "TFLOP/s", "rate": multiplied.to_json()},
    ]
    workbench.ceilings = restored(rows)
    return rows


def op(workbench: Workbench, name: str) -> list[Row]:
    """Time the forms of an op in turns; its name is one of `bench.work.ops.builders`."""
    workbench.clock.start_afresh()
    on_gpu = workbench.device.type == "cuda"
    size = workbench.sizes.ops
    op_work = builders(CONFIGURATIONS[size.configuration], size.batch, workbench.dtype, workbench.clock)[name]()
    works = {
        name: workbench.clock.captured(op_work.work(form))
        for name, form in forms(op_work.op, kernels=on_gpu, compiled=on_gpu).items()
    }
    for work in works.values():
        warm_up(work, workbench.clock, OP_WARM_UP)
    rows = []
    for name, samples in interleave(works, workbench.clock, workbench.sizes.seconds / 10).items():
        taken = samples.map(lambda t: t / len(op_work.sets))
        row: Row = {"op": op_work.name, "shape": op_work.shape, "form": name, "a_step": op_work.count}
        row |= {"seconds": taken.to_json(), "moved": op_work.moved, "operations": op_work.operations}
        rows.append(row | rates(taken.median, 0, op_work.moved, workbench.ceilings))
    return rows


def _scenario_row(workbench: Workbench, build: Callable[[], Scenario], variant: Variant) -> Row:
    prepared = prepare(build, variant, workbench.clock)
    scenario = prepared.scenario
    taken = measure(scenario.work, workbench.clock, workbench.sizes.seconds)
    peak = workbench.clock.peak_bytes()
    joules = workbench.meter.joules_per_call(scenario.work, workbench.clock)
    row = scenario_figures(scenario, taken, workbench.dtype, workbench.ceilings)
    row["variant"] = str(variant)
    row["first_call_seconds"] = prepared.first_call_seconds
    row["peak_gb"] = peak / 1e9 if peak else None
    row["build_peak_gb"] = prepared.build_peak / 1e9 if prepared.build_peak else None
    row["joules_per_image"] = joules / scenario.images if joules is not None else None
    row["energy"] = workbench.meter.reason
    return row


def loop(workbench: Workbench, size: Sampling, variant: Variant, **labels: Any) -> list[Row]:
    """Time a sampling loop."""
    config = CONFIGURATIONS[size.configuration]
    build = partial(sampling, config, size.batch, size.steps, variant, workbench.device)
    return [{"configuration": size.configuration, **labels} | _scenario_row(workbench, build, variant)]


def training(workbench: Workbench, size: Training, variant: Variant) -> list[Row]:
    """Time an optimizer step."""
    build = partial(train_step, CONFIGURATIONS[size.configuration], size.batch, variant, workbench.device)
    return [{"configuration": size.configuration} | _scenario_row(workbench, build, variant)]


def image_size(workbench: Workbench, size: Sampling, side: int) -> list[Row]:
    """Time a sampling loop of the same network on images of another size."""
    variant = default_variant(workbench.device)
    config = with_image_size(CONFIGURATIONS[size.configuration], side)
    build = partial(sampling, config, size.batch, size.steps, variant, workbench.device)
    labels = {"configuration": size.configuration, "over": "image side", "value": side}
    return [labels | _scenario_row(workbench, build, variant)]


def parts(workbench: Workbench, size: Training, steps: int) -> list[Row]:
    """Break a step down: an optimizer step for steps = 0, else a sampling loop of so many steps."""
    config, variant = CONFIGURATIONS[size.configuration], default_variant(workbench.device)
    if steps:
        build = partial(sampling, config, size.batch, steps, variant, workbench.device)
    else:
        build = partial(train_step, config, size.batch, variant, workbench.device)
    with labelled_ops():
        scenario = prepare(build, variant, workbench.clock).scenario
    found = time_by_part(scenario.work, workbench.clock)
    what = f"{'sampling' if steps else 'train'} step, {size.configuration}, batch {size.batch}, {variant}"
    row: Row = {"what": what, "parts": {name: part.seconds / scenario.steps for name, part in found.items()}}
    row["heaviest"] = {
        name: [[called, seconds / scenario.steps, runs / scenario.steps] for called, seconds, runs in part.heaviest]
        for name, part in found.items()
    }
    return [row]


def peers(workbench: Workbench, size: Training, steps: int, who: list[str]) -> list[Row]:
    """Time peers in turns: an optimizer step for steps = 0, else a sampling loop of so many steps."""
    config, device = CONFIGURATIONS[size.configuration], workbench.device
    workbench.clock.start_afresh()
    builds: dict[str, Callable[[], Any]] = {}
    chosen = [one for one in peers_on(device) if one.name in who]
    for one in chosen:
        if steps:
            builds[one.name] = partial(one.sampling, config, size.batch, steps, device)
        else:
            builds[one.name] = partial(one.train_step, config, size.batch, device)
    work = f"sampling, {steps} steps" if steps else "train step"
    what = f"{work}, {size.configuration}, batch {size.batch}"
    labels = {"what": what, "kind": "sampling" if steps else "train", "configuration": size.configuration}
    labels |= {"ours": OURS, "images": size.batch}
    described = {one.name: one.what for one in chosen}
    calls = {one.name: one.warm_up_calls(training=not steps) for one in chosen}
    rows = compare(builds, workbench.clock, workbench.sizes.seconds * len(chosen), calls)
    return [labels | {"runs": described[row["name"]]} | row for row in rows]


def first(workbench: Workbench, kind: Kind, size: Training) -> list[Row]:
    """Time the first step of a fresh process, cold and warm."""
    what = f"{kind}, {size.configuration}, batch {size.batch}, {default_variant(workbench.device)}"
    workbench.clock.start_afresh()
    return [{"what": what} | time_first_step(kind, size.configuration, size.batch)]


def restored(rows: list[Row]) -> Ceilings:
    """Read the ceilings back from a report's rows, in which they come in the order of `ceilings`."""
    copied, multiplied = rows
    dtype = multiplied["what"].partition(" ")[0]
    return Ceilings(copied["rate"]["median"], multiplied["rate"]["median"], dtype)
