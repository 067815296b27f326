"""What a visit measures first, what it is estimated to cost, and what nine minutes hold."""

import json
from functools import cache, partial

import pytest
import torch

from bench.peers import comparison
from bench.report import __main__ as report
from bench.report.budget import GUESSED, START_SECONDS, Budget, Compiled, Costs, Measurement, compiled
from bench.report.plan import plan
from bench.report.sizes import CPU, GPU, SIZES
from bench.work import scenarios as engine
from bench.work.figures import Ceilings
from bench.work.scenarios import CONFIGURATIONS, Variant, warm_up_calls
from ddpm_fast.engine.trainer import WARM_UP_STEPS

CIFAR = CONFIGURATIONS["cifar10"]
CAPTURED, EAGER = Variant(True, "captured"), Variant(True, "eager")

FIRST = [
    "ceilings",
    "agreement/cifar10-batch16",
    "loops/cifar10-batch256/captured-kernels",
    "loops/cifar10-batch16/captured-kernels",
    "loops/cifar10-batch1/captured-kernels",
    "loops/cifar10-batch256/captured-reference",
    "training/cifar10-batch128/captured-kernels",
    "training/cifar10-batch512/captured-kernels",
    "training/cifar10-batch128/captured-reference",
    "parts/sampling-cifar10-batch256",
    "parts/train-cifar10-batch128",
]


@cache
def planned(kind: str = "cuda", packages: tuple[str, ...] = tuple(comparison.MODULES)) -> list[Measurement]:
    return plan(kind, SIZES[kind], packages)


def names(kind: str = "cuda", packages: tuple[str, ...] = tuple(comparison.MODULES)) -> list[str]:
    return [one.name for one in planned(kind, packages)]


@pytest.mark.slow
def test_the_first_nine_minutes_on_a_gpu_hold_what_everybody_asks_for():
    seconds = 9 * 60 - report.PAGE_SECONDS
    scheduled = list(report.scheduled(planned(), Costs("cuda", GPU), seconds))[: len(FIRST)]
    assert [one.name for one, *_ in scheduled] == FIRST
    spent = [after for *_, after in scheduled]
    assert sorted(set(spent)) == spent  # each added to it: none was passed by
    assert spent[-1] <= seconds


def test_after_that_come_peers_then_ops_then_everything_else():
    groups = list(dict.fromkeys(name.split("/")[0] for name in names()))
    expected = "ceilings agreement loops training parts peers ops peers-compiled"
    assert groups == [*expected.split(), "first step", "scaling"]
    after_peers = names()[len(FIRST) + 4 :]
    assert after_peers[:2] == [
        "loops/cifar10-batch256/captured-kernels-cudnn-benchmark",
        "training/cifar10-batch128/captured-kernels-cudnn-benchmark",
    ]
    assert [name.startswith("ops/group_norm-") for name in after_peers[2:9]] == [True] * 6 + [False]
    assert [name.startswith("peers-compiled/") for name in after_peers[8:11]] == [True, True, False]
    assert names()[-1].startswith("peers-compiled/")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_every_measurement_has_a_name_and_a_cost(kind):
    costs = Costs(kind, SIZES[kind])
    assert len(set(names(kind))) == len(names(kind))
    assert all(0 < costs.of(one) < 2000 for one in planned(kind))


def test_a_cpu_compiles_last():
    found = names("cpu")
    late = [i for i, name in enumerate(found) if "compiled" in name]
    assert late == list(range(late[0], len(found)))


def test_a_gpu_is_asked_for_every_alternative_of_the_loop():
    alternatives = {name.rpartition("/")[2] for name in names() if name.startswith("loops/cifar10-batch16/")}
    modes = {f"{mode}-{who}" for mode in ("eager", "compiled", "captured") for who in ("reference", "kernels")}
    assert alternatives == modes | {"captured-kernels-1-step-graph", "captured-kernels-100-step-graph"}


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_peers_that_cannot_be_imported_are_not_planned(kind):
    assert not any(name.startswith("peers") for name in names(kind, ()))
    shipped = next(one for one in planned(kind, ("diffusers",)) if one.name.startswith("peers/"))
    assert isinstance(shipped.run, partial)
    who = shipped.run.keywords["who"]
    assert who[:2] == ["ddpm-fast", "diffusers"]
    assert "denoising-diffusion-pytorch" not in who
    assert any(name.startswith("peers-compiled/") for name in names(kind, ("diffusers",)))


def test_importing_is_tried_in_earnest(monkeypatch, tmp_path):
    (tmp_path / "kills_its_process.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tried = {"there": "json", "absent": "no_such_module_at_all", "broken": "kills_its_process"}
    monkeypatch.setattr(comparison, "MODULES", tried)
    assert comparison.importable()() == ["there"]


def test_launches_are_charged_to_what_is_launched():
    costs = Costs("cuda", GPU)
    captured, eager = (costs.step_seconds(CIFAR, 1, False, mode) for mode in ("captured", "eager"))
    assert captured == pytest.approx(0.001, rel=0.1)
    assert eager > 10 * captured
    assert costs.step_seconds(CIFAR, 256, True, "eager") > 10 * costs.step_seconds(CIFAR, 16, True, "captured")


def test_warm_up_calls_are_counted_as_they_are_made():
    # A loop captures itself in its first call; a trainer after three steps, and its next replay is the first.
    assert warm_up_calls(CAPTURED, training=False) == 1
    assert warm_up_calls(CAPTURED, training=True) == WARM_UP_STEPS + 2
    assert warm_up_calls(EAGER, training=True) == warm_up_calls(EAGER, training=False) == 1
    costs = Costs("cuda", GPU, Ceilings(3000, 1e9, "bfloat16"))  # arithmetic for nothing: a step takes a millisecond
    # One warm-up, one call to count, three rounds, one reading of energy; building is 2 s.
    assert costs.scenario(CIFAR, 1, 10_000, CAPTURED) == pytest.approx(2 + 10 * (1 + 1 + 3 + 1))


def test_ceilings_are_believed_once_they_are_measured():
    guessed, slow = Costs("cuda", GPU), Costs("cuda", GPU, Ceilings(3000, 70, "bfloat16"))
    assert slow.step_seconds(CIFAR, 256, True, "captured") > 5 * guessed.step_seconds(CIFAR, 256, True, "captured")


def test_compiling_twice_and_starting_twice_is_charged_once():
    one = Measurement("one", "loops", lambda _: 1.0, lambda _: [], compiled("cifar10", 16, False, CAPTURED))
    costs = Costs("cuda", GPU)
    cold, warm = (Compiled(False, "").seconds("cuda", known) for known in (False, True))
    assert costs.of(one) == START_SECONDS["cuda"] + cold + 1
    costs.made(one)
    assert costs.of(one) == warm + 1
    costs.made(one, failed=True)  # its process is gone, what it compiled is not
    assert costs.of(one) == START_SECONDS["cuda"] + warm + 1
    assert compiled("cifar10", 16, False, EAGER) == ()
    assert Compiled(True, "").seconds("cuda", False) > cold


def test_a_dry_run_for_a_gpu_touches_none(monkeypatch, capsys):
    def touched() -> None:
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    monkeypatch.setattr(report, "importable", lambda: lambda: ["diffusers"])
    assert report.main(["--dry-run", "--device", "cuda", "--minutes", "9"]) == 0
    first, head, *lines = capsys.readouterr().out.splitlines()
    assert "530 s to measure in; guessed, not measured" in first
    assert f"{GUESSED['cuda'].copy_gb_per_s:.0f} GB/s" in first
    assert head.split() == ["seconds", "in", "all", "measurement"]
    assert [line.split()[2] for line in lines[: len(FIRST)]] == FIRST
    assert not any("does not fit" in line for line in lines[: len(FIRST)])
    assert any("does not fit" in line for line in lines)


def test_a_dry_run_leaves_out_what_the_folder_holds(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "importable", lambda: list)
    measured = {"ceilings": {"rows": []}, FIRST[1]: {"failed": "RuntimeError: no"}, FIRST[2]: {"rows": []}}
    (tmp_path / "report.json").write_text(json.dumps({"measurements": measured}))
    assert report.main(["--dry-run", "--device", "cuda", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[2] for line in lines[:2]] == [FIRST[1], FIRST[3]]


def test_all_kinds_of_device_measure_known_configurations():
    for sizes in (CPU, GPU):
        used = [*sizes.training, *sizes.sampling, *sizes.report_sampling, *sizes.report_training, *sizes.more_training]
        used += [*sizes.peer_training, *sizes.peer_sampling, sizes.ops, sizes.varied]
        assert {size.configuration for size in used} | {sizes.scaling.configuration} <= set(engine.CONFIGURATIONS)


def test_a_budget_runs_down():
    now = iter((10.0, 13.0))
    assert Budget(5.0, lambda: next(now)).left() == 2.0
