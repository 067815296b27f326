"""The report: what it measures and leaves out, what a cut-off leaves behind, and its page and plots."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.report import __main__ as report
from bench.report import child, page, sections, tables
from bench.report.budget import Budget, Costs, Measurement
from bench.report.plan import plan
from bench.report.sizes import TINY
from bench.report.workbench import Workbench
from bench.work import first_step

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TRIAL = ("--device", "cpu", "--sizes", "tiny")


class Here:
    """Measures in this process, as `child.Worker` does in another."""

    def __init__(self, arguments: list[str]) -> None:
        self.bench = Workbench.at(CPU, TINY)
        self.packages: list[str] = []

    def first_word(self) -> child.Answer:
        return child.first_word(self.bench)

    def measure(self, measurement: Measurement, ceilings: Any, seconds: float) -> child.Answer:
        self.bench.ceilings = ceilings
        return child.answer(self.bench, measurement)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def within_seconds(monkeypatch):
    """Measure in this process, compile nothing (a minute each on a CPU), and start no process for the first step."""
    monkeypatch.setattr(report, "Worker", Here)
    monkeypatch.setattr(report, "importable", lambda: lambda: ["diffusers"])
    monkeypatch.setattr(
        report, "plan", lambda *arguments: [one for one in plan(*arguments) if "compiled" not in one.name]
    )
    monkeypatch.setattr(
        "bench.report.measurements.time_first_step",
        lambda *arguments: dict.fromkeys(
            ("cold_seconds", "warm_seconds", "cold_step_seconds", "warm_step_seconds"), 1.5
        ),
    )


def entry(name: str, cost: float, rows: list[dict[str, Any]] | Exception | None = None) -> Measurement:
    def run(bench: Workbench) -> list[dict[str, Any]]:
        if isinstance(rows, Exception):
            raise rows
        return rows or []

    return Measurement(name, "ops", lambda costs: cost, run)


def blank() -> dict[str, Any]:
    return report.new_report(Here([]).first_word(), report.headline("cpu", TINY))


def measure(folder: Path, planned: list[Measurement], seconds: float = 60.0) -> dict[str, Any]:
    written = blank()
    report.measure_all(folder, written, planned, Costs("cpu", TINY), Budget(seconds), Here([]))  # pyright: ignore[reportArgumentType]
    return written


@pytest.mark.slow
def test_the_whole_command_measures_and_writes_a_page(tmp_path):
    assert report.main(["--minutes", "20", "--out", str(tmp_path), *TRIAL]) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert {v["group"] for v in written["measurements"].values()} == {
        "ceilings", "agreement", "loops", "training", "parts", "peers", "ops", "first step", "scaling"
    }  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    for heading in ("two ceilings", "Do all loops", "Side by side", "Sampling", "Training", "Ops at", "Scaling"):
        assert f"## {heading}" in text or f"## The {heading}" in text
    assert text.index("| sampling, batch 2 |") < text.index("Measured ")  # the headline comes first
    assert "Energy is not measured: NVML measures NVIDIA GPUs only." in text
    assert "No GPU" in text
    assert "`aten::convolution_backward`" in text
    for name in page.PLOTS:
        assert (tmp_path / name).stat().st_size > 5000
        assert f"]({name})" in text
    # With a log beside them, no more than eight files, named plainly.
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) < 8
    assert all(name.replace(".", "").replace("_", "").replace("-", "").isalnum() for name in names)


@pytest.mark.slow
def test_a_second_run_keeps_what_is_there_and_measures_the_rest(tmp_path, monkeypatch):
    out = ["--out", str(tmp_path), *TRIAL]
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


def test_peers_that_are_gone_and_another_host_of_a_gpu_keep_what_is_there(tmp_path, capsys):
    versions = {"torch": "2", "triton": "3", "diffusers": "1", "denoising-diffusion-pytorch": "not installed"}
    old = blank()
    old["machine"] = {"device": "a GPU", "type": "cuda", "host": "one", "memory_gb": 80, "versions": versions}
    old["measurements"] = {"kept": {"group": "ops", "rows": []}}
    (tmp_path / "report.json").write_text(json.dumps(old))

    def opened(**changed: Any) -> dict[str, Any]:
        machine = {
            **old["machine"],
            "host": "another",
            "versions": versions | {"diffusers": "not installed"},
            **changed,
        }
        return report.open_report(tmp_path, blank() | {"machine": machine})

    kept = opened()
    assert list(kept["measurements"]) == ["kept"]
    assert kept["machine"]["versions"]["diffusers"] == "1"
    assert capsys.readouterr().out == ""
    assert opened(memory_gb=140)["measurements"] == {}
    assert "starting anew" in capsys.readouterr().out


def test_what_does_not_fit_is_left_out_and_listed_and_cheaper_things_go_on(tmp_path):
    written = measure(tmp_path, [entry("first", 1.0), entry("dear", 1e6), entry("cheap", 1.0)])
    assert list(written["measurements"]) == ["first", "cheap"]
    assert written["left_out"] == [{"name": "dear", "estimated_seconds": 1_000_000}]
    assert "- dear: about 1000000 s" in (tmp_path / "report.md").read_text()


def test_a_machine_slower_than_estimated_is_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "take", lambda *_: {"group": "ops", "load": 1, "rows": [], "took_seconds": 100.0})
    # The first took twenty times its estimate, so the second's is raised from 10 s to hundreds.
    written = measure(tmp_path, [entry("first", 1.0), entry("second", 10.0)])
    assert [one["name"] for one in written["left_out"]] == ["second"]


def test_a_measurement_is_given_thrice_its_estimate_and_a_minute_within_the_budget(monkeypatch):
    given = []
    monkeypatch.setattr(Here, "measure", lambda self, one, ceilings, seconds: given.append(seconds) or {"rows": []})
    for budget in (1000.0, 30.0):
        report.take(entry("one", 1.0), 10.0, Costs("cpu", TINY), Budget(budget), Here([]))  # pyright: ignore[reportArgumentType]
    assert given == pytest.approx([90, 30], abs=0.1)


def test_what_the_budgets_end_cuts_off_is_left_out_and_has_not_failed(tmp_path, monkeypatch):
    budget = Budget(60.0)

    def cut_off(*_: Any) -> dict[str, Any]:
        monkeypatch.setattr(budget, "seconds", 0.0)
        return {"group": "ops", "load": 1, "failed": "no answer within 9 s", "took_seconds": 9.0}

    monkeypatch.setattr(report, "take", cut_off)
    written = blank()
    report.measure_all(tmp_path, written, [entry("long", 1.0)], Costs("cpu", TINY), budget, Here([]))  # pyright: ignore[reportArgumentType]
    assert written["measurements"] == {}
    assert [one["name"] for one in written["left_out"]] == ["long"]


def test_a_failure_is_an_entry_and_is_tried_again(tmp_path):
    planned = [entry("breaks", 1.0, RuntimeError("CUDA error: no kernel image\nmore")), entry("works", 1.0)]
    written = measure(tmp_path, planned)
    assert written["measurements"]["breaks"]["failed"] == "RuntimeError: CUDA error: no kernel image"
    assert "rows" in written["measurements"]["works"]
    assert report.failures(written) == ["breaks: RuntimeError: CUDA error: no kernel image"]
    assert "- breaks: RuntimeError: CUDA error: no kernel image" in (tmp_path / "report.md").read_text()
    assert list(report.open_report(tmp_path, blank())["measurements"]) == ["works"]


def test_a_failure_is_the_commands_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "plan", lambda *_: [entry("breaks", 1.0, RuntimeError("no")), entry("works", 1.0)])
    assert report.main(["--out", str(tmp_path), *TRIAL]) == 1
    *_, failed, last = capsys.readouterr().out.splitlines()
    assert failed == "FAILED breaks: RuntimeError: no"
    assert last == f"{tmp_path / 'report.md'}: 1 measured, 1 failed, 0 left out"


def test_loops_that_do_not_agree_are_a_failure():
    rows = [{"variant": "captured-kernels", "agrees": False}, {"variant": "eager-kernels", "agrees": True}]
    found = report.failures({"measurements": {"agreement/x": {"group": "agreement", "rows": rows}}})
    assert found == ["agreement/x: captured-kernels makes other images"]


def test_no_gpu_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report.main(["--device", "cuda"]) == 2
    assert "there is no NVIDIA GPU here" in capsys.readouterr().err


CUT_OFF = """
import os, signal, sys
from pathlib import Path
from bench.report import __main__ as report
from bench.report.budget import Budget, Costs, Measurement
from bench.report.sizes import TINY

class Worker:
    def measure(self, measurement, ceilings, seconds):
        if measurement.name == "killed in the middle":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"rows": []}

planned = [Measurement(name, "ops", lambda costs: 1.0, None) for name in ("done", "killed in the middle")]
machine = {"device": "a CPU", "type": "cpu", "host": "", "cores": 1, "system": "", "versions": {}}
blank = report.new_report({"machine": machine, "dtype": ""}, report.headline("cpu", TINY))
report.measure_all(Path(sys.argv[1]), blank, planned, Costs("cpu", TINY), Budget(60.0), Worker())
"""


def test_a_visit_that_is_cut_off_leaves_what_it_has(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", CUT_OFF, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list(json.loads((tmp_path / "report.json").read_text())["measurements"]) == ["done"]
    assert (tmp_path / "report.md").exists()


def test_the_page_writes_figures_as_they_read_best():
    assert [tables.duration(s) for s in (123.4, 1.234, 0.0123, 4.56e-5, 7e-8, 4321.0)] == [
        "123 s", "1.23 s", "12.3 ms", "45.6 us", "70 ns", "4321 s"
    ]  # fmt: skip
    assert tables.with_spread({"median": 2.0, "low": 1.0, "high": 3.0}, str) == "2.0 (1.0 to 3.0)"
    assert tables.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |", ""]
    assert tables.share(0.256) == "26%"
    assert tables.share(None) == tables.number(None) == "-"


def test_a_peer_without_figures_shows_its_reason():
    one = {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    row = {"what": "train step", "ours": "ddpm-fast", "name": "another", "runs": "as shipped", "images": 4}
    ours = row | {"name": "ddpm-fast", "seconds": one, "times_as_long": one}
    lines = sections.peers([ours, row | {"reason": "ImportError: torchvision"}, ours])
    assert any("did not run: ImportError: torchvision" in line for line in lines)
    assert lines.count("### Train step") == 2  # a second comparison of the same work is a table of its own


def test_the_headline_tells_whole_images_and_the_peers_ratios():
    written = blank()
    top = {"configuration": "cifar10", "timesteps": 1000, "many": 256, "one": 1, "training": 128, "variant": "v"}
    ours = {"configuration": "cifar10", "variant": "v"}
    loops = [ours | {"images": 256, "seconds_per_step": {"median": 0.008}}]
    loops.append(ours | {"images": 1, "seconds_per_step": {"median": 0.0007}})
    steps = [ours | {"images": 128, "seconds_per_step": {"median": 0.016}}]
    peer = {"kind": "sampling", "configuration": "cifar10", "images": 256, "name": "diffusers", "ours": "ddpm-fast"}
    peer["times_as_long"] = {"median": 5.5}
    rows = {"loops": loops, "training": steps, "peers": [peer]}
    measured = {name: {"group": name, "load": 1, "rows": found} for name, found in rows.items()}
    lines = page._headline(written | {"headline": top, "measurements": measured})
    assert lines[-4:-1] == [
        "| sampling, batch 256 | 32 images/s | 5.50 times as long |",  # 256 images in 1000 steps of 8 ms
        "| sampling, batch 1 | 700 ms an image | - |",
        "| training, batch 128 | 8e+03 images/s | - |",
    ]
    assert page._headline({"measurements": {}}) == []


@pytest.mark.slow
def test_the_first_step_is_timed_in_processes_of_its_own():
    found = first_step.time_first_step("sample", "digits", 1)
    assert 0 < found["warm_step_seconds"] < found["warm_seconds"] < 120
    assert 0 < found["cold_step_seconds"] < found["cold_seconds"] < 120


def test_a_first_step_that_fails_tells_its_last_line():
    with pytest.raises(RuntimeError, match="KeyError: 'no such network'"):
        first_step.time_first_step("sample", "no such network", 1)
