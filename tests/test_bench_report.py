"""The report: what it measures first, what it leaves out, what a cut-off leaves behind, and its page and plots."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import engine, first_step, page, report
from bench.clock import CudaClock
from bench.energy import EnergyMeter
from bench.figures import Ceilings
from bench.plan import plan
from bench.sizes import CPU, GPU, Sampling, Scaling, Sizes, Training
from bench.visit import Budget, Measurement, Visit
from ddpm_fast.config import Config, TrainingConfig, UNetConfig

ROOT = Path(__file__).parents[1]
TINY = Config(
    unet=UNetConfig(1, 8, 8, 8, (1, 2), res_blocks=1, attention_resolutions=(4,), groups=4),
    training=TrainingConfig(batch_size=2),
)
TINY_SIZES = Sizes(
    training=(),
    sampling=(),
    ops=Training("tiny", 2),
    norms=1,
    copy_megabytes=4,
    matrix_side=64,
    rounds=1,
    report_sampling=(Sampling("tiny", 1, 4),),
    report_training=(Training("tiny", 2),),
    peer_training=(Training("tiny", 2),),
    peer_sampling=(Sampling("tiny", 2, 2),),
    scaling=Scaling("tiny", 1, 2, (1, 2), (8, 16), (1, 2)),
    seconds=0.01,
)


@pytest.fixture
def tiny(monkeypatch):
    """Make the report's plan one of seconds; a fresh process would not know this configuration, so it gets none."""
    monkeypatch.setitem(engine.CONFIGURATIONS, "tiny", TINY)
    monkeypatch.setattr("bench.visit.sizes_for", lambda device: TINY_SIZES)
    monkeypatch.setattr(
        "bench.measurements.time_first_step",
        lambda *arguments: dict.fromkeys(
            ("cold_seconds", "warm_seconds", "cold_step_seconds", "warm_step_seconds"), 1.5
        ),
    )


def gpu_visit() -> Visit:
    """A visit to a GPU that is not there: enough to plan it."""
    device = torch.device("cuda")
    return Visit(device, GPU, CudaClock(device), EnergyMeter(None), torch.bfloat16, Ceilings(4000, 790, "bfloat16"))


def entry(name: str, cost: float, rows: list[dict[str, Any]] | Exception | None = None) -> Measurement:
    def run() -> list[dict[str, Any]]:
        if isinstance(rows, Exception):
            raise rows
        return rows or []

    return Measurement(name, "ops", lambda: cost, run)


def blank(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    return tmp_path, report.new_report(Visit.to(torch.device("cpu")))


def test_the_whole_command_measures_and_writes_a_page(tiny, tmp_path, capsys):
    assert report.main(["--minutes", "20", "--out", str(tmp_path), "--device", "cpu"]) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    # Compilers are not started here: what takes a minute on a CPU comes last and is tried by hand.
    measured = {k: v for k, v in written["measurements"].items() if "compiled" not in k}
    assert {k: v["failed"] for k, v in measured.items() if "failed" in v} == {}
    assert {v["group"] for v in measured.values()} == {
        "ceilings", "ops", "loops", "training", "parts", "peers", "first step", "scaling"
    }  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    for heading in ("two ceilings", "Side by side", "Sampling", "Training", "Ops at", "The first step", "Scaling"):
        assert f"## {heading}" in text or f"## The {heading}" in text
    assert "Energy is not measured: NVML measures NVIDIA GPUs only." in text
    assert "No GPU" in text
    for name in page.PLOTS:
        assert (tmp_path / name).stat().st_size > 5000
        assert f"]({name})" in text


@pytest.fixture(autouse=True)
def without_compilers(monkeypatch):
    """Leave out of every plan what compiles: a minute each on a CPU."""
    monkeypatch.setattr(report, "plan", lambda visit: [one for one in plan(visit) if "compiled" not in one.name])


def test_a_second_run_keeps_what_is_there_and_measures_the_rest(tiny, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path), "--device", "cpu"]
    report.main([*out, "--only", "training"])
    first = json.loads((tmp_path / "report.json").read_text())
    assert {one["group"] for one in first["measurements"].values()} == {"ceilings", "training"}
    report.main([*out, "--only", "loops"])
    second = json.loads((tmp_path / "report.json").read_text())
    assert {k: second["measurements"][k] for k in first["measurements"]} == first["measurements"]
    assert "loops" in {one["group"] for one in second["measurements"].values()}

    monkeypatch.setattr(report, "sources", lambda: "another engine")
    report.main([*out, "--only", "parts"])
    third = json.loads((tmp_path / "report.json").read_text())
    assert {one["group"] for one in third["measurements"].values()} == {"ceilings", "parts"}


def test_what_does_not_fit_is_left_out_and_listed_and_cheaper_things_go_on(tmp_path):
    folder, written = blank(tmp_path)
    planned = [entry("first", 1.0), entry("dear", 1e6), entry("cheap", 1.0)]
    report.measure_all(folder, written, planned, Budget(60.0))
    assert list(written["measurements"]) == ["first", "cheap"]
    assert written["left_out"] == [{"name": "dear", "estimated_seconds": 1_000_000}]
    assert "- dear: about 1000000 s" in (tmp_path / "report.md").read_text()


def test_a_machine_slower_than_estimated_is_believed(tmp_path, monkeypatch):
    folder, written = blank(tmp_path)
    monkeypatch.setattr(report, "take", lambda one, _: {"group": "ops", "load": 1, "took_seconds": 100.0})
    # The first took a hundred times its estimate, so the second's is raised from 10 s to hundreds.
    report.measure_all(folder, written, [entry("first", 1.0), entry("second", 10.0)], Budget(60.0))
    assert [one["name"] for one in written["left_out"]] == ["second"]


def test_a_failure_is_an_entry_and_is_tried_again(tmp_path):
    folder, written = blank(tmp_path)
    planned = [entry("breaks", 1.0, RuntimeError("CUDA error: no kernel image\nmore")), entry("works", 1.0)]
    report.measure_all(folder, written, planned, Budget(60.0))
    assert written["measurements"]["breaks"]["failed"] == "RuntimeError: CUDA error: no kernel image"
    assert "rows" in written["measurements"]["works"]
    assert "- breaks: RuntimeError: CUDA error: no kernel image" in (tmp_path / "report.md").read_text()
    again = report.open_report(folder, Visit.to(torch.device("cpu")))
    assert list(again["measurements"]) == ["works"]


CUT_OFF = """
import os, signal, sys
from pathlib import Path
import torch
from bench import report
from bench.visit import Budget, Measurement, Visit

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

planned = [
    Measurement("done", "ops", lambda: 1.0, lambda: []),
    Measurement("killed in the middle", "ops", lambda: 1.0, killed),
]
report.measure_all(Path(sys.argv[1]), report.new_report(Visit.to(torch.device("cpu"))), planned, Budget(60.0))
"""


def test_a_visit_that_is_cut_off_leaves_what_it_has(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", CUT_OFF, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list(json.loads((tmp_path / "report.json").read_text())["measurements"]) == ["done"]
    assert (tmp_path / "report.md").exists()


def test_a_budget_runs_down():
    now = iter((10.0, 13.0))
    assert Budget(5.0, lambda: next(now)).left() == 2.0


@pytest.mark.parametrize("visit", [gpu_visit(), Visit.to(torch.device("cpu"))], ids=["gpu", "cpu"])
def test_the_plan_goes_from_the_ceilings_to_scaling_by_importance(visit):
    planned = plan(visit)
    names = [one.name for one in planned]
    assert len(set(names)) == len(names)
    groups = list(dict.fromkeys(one.group for one in planned))
    assert groups == ["ceilings", "ops", "loops", "training", "parts", "peers", "first step", "scaling"]
    assert all(0 < one.cost() < 2000 for one in planned)


def test_a_gpu_is_asked_for_every_alternative_of_the_loop_and_every_peer():
    names = [one.name for one in plan(gpu_visit())]
    alternatives = {name.rpartition("/")[2] for name in names if name.startswith("loops/cifar10-batch16/")}
    modes = {f"{mode}-{who}" for mode in ("eager", "compiled", "captured") for who in ("reference", "kernels")}
    assert alternatives == modes | {"captured-kernels-1-step-graph", "captured-kernels-100-step-graph"}
    assert {"peers/sampling-cifar10-batch1", "peers-compiled/train-cifar10-batch128"} <= set(names)


def test_more_work_and_compiling_cost_more():
    visit, config = gpu_visit(), engine.CONFIGURATIONS["cifar10"]
    eager, captured = (engine.Variant(True, mode) for mode in ("eager", "captured"))
    assert visit.cost(config, 256, 1000, False, eager) > visit.cost(config, 16, 1000, False, eager)
    assert visit.cost(config, 16, 10, False, captured) > 50 + visit.cost(config, 16, 10, False, eager)
    slower = replace(visit, ceilings=Ceilings(4000, 79, "bfloat16"))
    assert slower.step_seconds(config, 256, True) > 5 * visit.step_seconds(config, 256, True)


def test_both_kinds_of_device_measure_known_configurations():
    for sizes in (CPU, GPU):
        used = [*sizes.training, *sizes.sampling, *sizes.report_sampling, *sizes.report_training]
        used += [*sizes.peer_training, *sizes.peer_sampling, sizes.ops]
        assert {size.configuration for size in used} | {sizes.scaling.configuration} <= set(engine.CONFIGURATIONS)


def test_the_page_writes_figures_as_they_read_best():
    assert [page.duration(s) for s in (123.4, 1.234, 0.0123, 4.56e-5, 7e-8, 4321.0)] == [
        "123 s", "1.23 s", "12.3 ms", "45.6 us", "70 ns", "4321 s"
    ]  # fmt: skip
    assert page.with_spread({"median": 2.0, "low": 1.0, "high": 3.0}, str) == "2.0 (1.0 to 3.0)"
    assert page.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |", ""]
    assert page.share(0.256) == "26%"
    assert page.share(None) == page.number(None) == "-"


def test_a_peer_without_figures_shows_its_reason():
    one = {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    row = {"what": "train step", "ours": "ddpm-fast", "name": "another", "runs": "as shipped", "images": 4}
    ours = row | {"name": "ddpm-fast", "seconds": one, "times_as_long": one}
    lines = page._peers([ours, row | {"reason": "ImportError: torchvision"}, ours])
    assert any("did not run: ImportError: torchvision" in line for line in lines)
    assert lines.count("### Train step") == 2  # a second comparison of the same work is a table of its own


def test_the_first_step_is_timed_in_processes_of_its_own():
    found = first_step.time_first_step("sample", "digits", 1)
    assert 0 < found["warm_step_seconds"] < found["warm_seconds"] < 120
    assert 0 < found["cold_step_seconds"] < found["cold_seconds"] < 120


def test_a_first_step_that_fails_tells_its_last_line():
    with pytest.raises(RuntimeError, match="KeyError: 'no such network'"):
        first_step.time_first_step("sample", "no such network", 1)
