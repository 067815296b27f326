"""What a run decided is kept, holds when it goes on, and where it cannot hold, that is said."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from ddpm_fast.config import TrainingConfig
from ddpm_fast.engine import threads
from ddpm_fast.runs import decisions
from ddpm_fast.runs.decisions import Decisions, decide, settle

TRAINING = TrainingConfig(device="auto", accumulate=2)
ON_CPU = Decisions("cpu", "fp32", threads=2, compiled=False, captured=False, accumulate=2)


@pytest.fixture(autouse=True)
def a_machine_of_two_cores_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    for name in threads.USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_new_run_measures_its_threads(monkeypatch):
    monkeypatch.setattr(decisions, "choose_threads", lambda: torch.set_num_threads(2))
    assert settle(TRAINING, None) == (ON_CPU, ())
    assert str(ON_CPU) == "cpu (2 threads), fp32, eager"


def test_what_was_decided_holds_without_measuring(monkeypatch):
    monkeypatch.setattr(decisions, "choose_threads", lambda: pytest.fail("measured again"))
    assert settle(TRAINING, ON_CPU) == (ON_CPU, [])
    assert torch.get_num_threads() == 2


def test_fewer_cores_are_said_and_the_run_goes_on():
    found, said = settle(TRAINING, replace(ON_CPU, threads=16))
    assert (found.threads, said) == (2, ["16 threads before, now 2, by the 2 cores that are here"])


def test_the_users_threads_win_and_are_said(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found, said = settle(TRAINING, ON_CPU)
    assert (found.threads, said) == (1, ["2 threads before, now 1, by OMP_NUM_THREADS"])


def test_a_gpu_that_is_gone_is_said_and_its_precision_is_not_kept():
    earlier = Decisions("cuda", "bf16", threads=16, compiled=True, captured=True, accumulate=2)
    found, said = settle(TRAINING, earlier)
    assert found == replace(ON_CPU, threads=1)
    assert said == ["on cuda before, now on cpu, since there is no cuda here"]


def test_precision_is_kept_unless_it_was_asked_for():
    earlier = replace(ON_CPU, precision="bf16")
    assert settle(TRAINING, earlier)[0].precision == "bf16"
    assert settle(replace(TRAINING, precision="fp32"), earlier)[0].precision == "fp32"


@pytest.mark.parametrize(
    "values", [{}, {"decided": {}}, {"decided": asdict(ON_CPU) | {"threads": "2"}}, {"decided": [1]}]
)
def test_what_cannot_be_read_is_decided_anew(tmp_path: Path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert decisions.read(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"decided": asdict(ON_CPU)}))
    assert decisions.read(tmp_path) == ON_CPU


def test_a_run_keeps_what_it_decided_and_uses_it(tmp_path):
    from ddpm_fast.config import with_training
    from ddpm_fast.data.dataset import open_dataset
    from ddpm_fast.presets import PRESETS
    from ddpm_fast.runs.run import Run

    config = with_training(PRESETS["digits"], device="auto")
    data = open_dataset(config.data, config.unet)
    assert Run(tmp_path / "a", config, data, None, progress=False).trainer.dtype == torch.float32
    assert decisions.read(tmp_path / "a") == decide(config.training)
    given = replace(decide(config.training), precision="bf16")
    run = Run(tmp_path / "b", config, data, None, progress=False, decided=given)
    assert run.trainer.dtype == torch.bfloat16
    assert decisions.read(tmp_path / "b") == given
    assert json.loads((tmp_path / "b/config.json").read_text())["config"]["training"]["precision"] == "auto"
