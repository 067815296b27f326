"""What every benchmark needs: the device, its clock, its ceilings, and one way to time and to say what it means."""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.report.measurements import OP_WARM_UP, prepare
from bench.report.sizes import sizes_for
from bench.timing.clock import clock_for, warm_up
from bench.timing.energy import EnergyMeter, energy_meter
from bench.timing.machine import commit, machine
from bench.timing.timings import Timings
from bench.work.figures import Ceilings, copy_rate, matrix_rate, rates, scenario_figures
from bench.work.ops import Op, OpWork
from bench.work.scenarios import Scenario, Variant, default_variant, loop_dtype, variants
from ddpm_fast.engine.execution import choose_device, disable_malloc_trim

disable_malloc_trim()
DEVICE = choose_device("auto")
CLOCK = clock_for(DEVICE)
SIZES = sizes_for(DEVICE)
VARIANTS = variants(DEVICE) if DEVICE.type == "cuda" else [default_variant(DEVICE)]  # a CPU compiles for minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK.now))
        item.add_marker(pytest.mark.timeout(1800))  # 1000 eager steps on 1024 images take minutes


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["ddpm_fast"] = {**machine(DEVICE), "commit": commit()}


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """This device's copy and matrix rates."""
    dtype = loop_dtype(DEVICE)
    copied = copy_rate(CLOCK, 2.0, SIZES.copy_megabytes).median
    multiplied = matrix_rate(CLOCK, 2.0, dtype, SIZES.matrix_side).median
    return Ceilings(copied, multiplied, str(dtype).removeprefix("torch."))


@pytest.fixture(scope="session")
def meter() -> EnergyMeter:
    return energy_meter(DEVICE)


@pytest.fixture
def time_scenario(benchmark: BenchmarkFixture, ceilings: Ceilings, meter: EnergyMeter) -> Callable[..., None]:
    """Time a training step or a sampling loop, given how to build it."""

    def run(build: Callable[[], Scenario], variant: Variant) -> None:
        prepared = prepare(build, variant, CLOCK)
        scenario = prepared.scenario
        benchmark.pedantic(scenario.work, rounds=SIZES.rounds)
        if benchmark.stats is None:  # --benchmark-disable
            return
        taken = Timings(tuple(benchmark.stats.stats.data))
        joules = meter.joules_per_call(scenario.work, CLOCK)
        benchmark.extra_info.update(
            scenario_figures(scenario, taken, loop_dtype(DEVICE), ceilings),
            device=machine(DEVICE)["device"],
            versions=machine(DEVICE)["versions"],
            first_call_seconds=prepared.first_call_seconds,
            peak_gb=(CLOCK.peak_bytes() or 0) / 1e9,
            joules_per_image=joules / scenario.images if joules is not None else meter.reason,
        )

    return run


@pytest.fixture
def time_op(benchmark: BenchmarkFixture, ceilings: Ceilings) -> Callable[..., None]:
    """Time one form of an op."""

    def run(op_work: OpWork, form: Op) -> None:
        CLOCK.start_afresh()
        work = op_work.work(form)
        warm_up(work, CLOCK, OP_WARM_UP)
        benchmark.pedantic(CLOCK.captured(work), rounds=10 * SIZES.rounds)
        if benchmark.stats is None:
            return
        taken = Timings(tuple(benchmark.stats.stats.data)).map(lambda t: t / len(op_work.sets))
        benchmark.extra_info.update(
            shape=op_work.shape,
            seconds_per_call=taken.to_json(),
            calls=len(op_work.sets),
            **rates(taken.median, 0, op_work.moved, ceilings),
            device=machine(DEVICE)["device"],
            versions=machine(DEVICE)["versions"],
        )

    return run
