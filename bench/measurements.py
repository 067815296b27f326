"""What the report measures, one function a kind of figure; each returns rows for the report's tables."""

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.clock import interleave, measure, warm_up
from bench.engine import CONFIGURATIONS, Scenario, Variant, default_variant, sampling, train_step, with_image_size
from bench.figures import Ceilings, copy_rate, matrix_rate, rates, scenario_figures
from bench.first_step import Kind, time_first_step
from bench.op_work import OpWork, forms
from bench.parts import time_by_part
from bench.peers import OURS, Contender, compare
from bench.sizes import Sampling, Training
from bench.visit import Row, Visit
from ddpm_fast.engine.trainer import WARM_UP_STEPS

WARM_UP = {"eager": 1, "compiled": 3, "captured": WARM_UP_STEPS + 2}
"""Calls before a scenario is timed: compiling, what capturing needs, capturing, and the first replay."""


def ceilings(visit: Visit) -> list[Row]:
    """Measure the two ceilings and leave them with the visit."""
    copied = copy_rate(visit.clock, visit.sizes.seconds / 2, visit.sizes.copy_megabytes)
    multiplied = matrix_rate(visit.clock, visit.sizes.seconds / 2, visit.dtype, visit.sizes.matrix_side)
    dtype = str(visit.dtype).removeprefix("torch.")
    visit.ceilings = Ceilings(copied.median, multiplied.median, dtype)
    side = visit.sizes.matrix_side
    return [
        {"what": f"copy of {visit.sizes.copy_megabytes} MiB", "unit": "GB/s", "rate": copied.to_json()},
        {"what": f"{dtype} matrix product, {side} cubed", "unit": "TFLOP/s", "rate": multiplied.to_json()},
    ]


def op(visit: Visit, build: Callable[[], OpWork]) -> list[Row]:
    """Time the forms of an op in turns."""
    visit.clock.start_afresh()
    on_gpu = visit.device.type == "cuda"
    op_work = build()
    works = {
        name: visit.clock.captured(op_work.work(form))
        for name, form in forms(op_work.op, kernels=on_gpu, compiled=on_gpu).items()
    }
    for work in works.values():
        warm_up(work, visit.clock, WARM_UP["compiled"])
    rows = []
    for name, samples in interleave(works, visit.clock, visit.sizes.seconds / 10).items():
        taken = samples.map(lambda t: t / len(op_work.sets))
        row: Row = {"op": op_work.name, "shape": op_work.shape, "form": name, "a_step": op_work.count}
        row |= {"seconds": taken.to_json(), "moved": op_work.moved, "operations": op_work.operations}
        rows.append(row | rates(taken.median, 0, op_work.moved, visit.ceilings))
    return rows


def _scenario_row(visit: Visit, build: Callable[[], Scenario], variant: Variant) -> Row:
    visit.clock.start_afresh()
    scenario = build()
    first = warm_up(scenario.work, visit.clock, WARM_UP[variant.mode])
    taken = measure(scenario.work, visit.clock, visit.sizes.seconds)
    peak = visit.clock.peak_bytes()
    joules = visit.meter.joules_per_call(scenario.work, visit.clock)
    row = scenario_figures(scenario, taken, visit.dtype, visit.ceilings)
    row["variant"] = str(variant)
    row["first_call_seconds"] = first
    row["peak_gb"] = peak / 1e9 if peak else None
    row["joules_per_image"] = joules / scenario.images if joules is not None else None
    row["energy"] = visit.meter.reason
    return row


def loop(visit: Visit, size: Sampling, variant: Variant, **labels: Any) -> list[Row]:
    """Time a sampling loop."""
    config = CONFIGURATIONS[size.configuration]
    build = partial(sampling, config, size.batch, size.steps, variant, visit.device)
    return [{"configuration": size.configuration, **labels} | _scenario_row(visit, build, variant)]


def training(visit: Visit, size: Training, variant: Variant) -> list[Row]:
    """Time an optimizer step."""
    build = partial(train_step, CONFIGURATIONS[size.configuration], size.batch, variant, visit.device)
    return [{"configuration": size.configuration} | _scenario_row(visit, build, variant)]


def image_size(visit: Visit, size: Sampling, side: int) -> list[Row]:
    """Time a sampling loop of the same network on images of another size."""
    variant = default_variant(visit.device)
    config = with_image_size(CONFIGURATIONS[size.configuration], side)
    build = partial(sampling, config, size.batch, size.steps, variant, visit.device)
    labels = {"configuration": size.configuration, "over": "image side", "value": side}
    return [labels | _scenario_row(visit, build, variant)]


def parts(visit: Visit, size: Training, steps: int) -> list[Row]:
    """Break a step down: an optimizer step for steps = 0, else a sampling loop of so many steps."""
    visit.clock.start_afresh()
    config, variant = CONFIGURATIONS[size.configuration], default_variant(visit.device)
    if steps:
        scenario = sampling(config, size.batch, steps, variant, visit.device)
    else:
        scenario = train_step(config, size.batch, variant, visit.device)
    warm_up(scenario.work, visit.clock, WARM_UP[variant.mode])
    taken = time_by_part(scenario.work, visit.clock)
    what = f"{'sampling' if steps else 'train'} step, {size.configuration}, batch {size.batch}, {variant}"
    return [{"what": what, "parts": {name: seconds / scenario.steps for name, seconds in taken.items()}}]


def peers(visit: Visit, size: Training, steps: int, who: list[Contender]) -> list[Row]:
    """Time contenders in turns: an optimizer step for steps = 0, else a sampling loop of so many steps."""
    config, device = CONFIGURATIONS[size.configuration], visit.device
    visit.clock.start_afresh()
    builds: dict[str, Callable[[], Any]] = {}
    for one in who:
        if steps:
            builds[one.name] = partial(one.sampling, config, size.batch, steps, device)
        else:
            builds[one.name] = partial(one.train_step, config, size.batch, device)
    work = f"sampling, {steps} steps" if steps else "train step"
    what = f"{work}, {size.configuration}, batch {size.batch}"
    described = {one.name: one.what for one in who}
    labels = {"what": what, "ours": OURS, "images": size.batch}
    rows = compare(builds, visit.clock, visit.sizes.seconds * len(who))
    return [labels | {"runs": described[row["name"]]} | row for row in rows]


def first(visit: Visit, kind: Kind, size: Training) -> list[Row]:
    """Time the first step of a fresh process, cold and warm."""
    what = f"{kind}, {size.configuration}, batch {size.batch}, {default_variant(visit.device)}"
    visit.clock.start_afresh()
    return [{"what": what} | time_first_step(kind, size.configuration, size.batch)]


def restored(rows: list[Row]) -> Ceilings:
    """Read the ceilings back from a report's rows, in which they come in the order of `ceilings`."""
    copied, multiplied = rows
    dtype = multiplied["what"].partition(" ")[0]
    return Ceilings(copied["rate"]["median"], multiplied["rate"]["median"], dtype)
