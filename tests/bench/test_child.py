"""A measuring process that dies, hangs or fails costs one figure; and whether loops agree is measured."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from bench.report import agreement, child
from bench.report.budget import Measurement
from bench.report.child import Child, ChildDiedError, Worker
from bench.report.sizes import TINY, Sampling
from bench.report.workbench import Workbench
from ddpm_fast.engine.sampling import SamplingLoop

CPU = torch.device("cpu")


def entry(name: str, group: str = "ops") -> Measurement:
    return Measurement(name, group, lambda _: 1.0, lambda _: [])


def alive(process_id: int) -> bool:
    status = Path(f"/proc/{process_id}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"  # Z: it has ended, and nobody asked how
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_a_process_measures_dies_and_is_followed_by_a_new_one():
    worker = Worker(["cpu", "tiny"])
    word = worker.first_word()
    assert (word["machine"]["type"], word["dtype"]) == ("cpu", "float32")
    assert worker.child is not None
    first = worker.child.process.pid
    measured = worker.measure(entry("ops/q_sample"), None, 60)
    assert measured["rows"][0]["op"] == "q_sample"
    assert worker.child.process.pid == first

    os.kill(first, signal.SIGKILL)
    died = worker.measure(entry("ops/q_sample"), None, 60)
    assert died == {"failed": "the process was ended by SIGKILL"}
    again = worker.measure(entry("ops/reverse_step"), None, 60)
    assert again["rows"][0]["op"] == "reverse_step"
    assert worker.child.process.pid != first
    second = worker.child.process.pid
    worker.close()
    assert not alive(second)


class StandIn:
    """A Child that is no process: it does what the names it is asked for say."""

    made = 0

    def __init__(self, arguments: list[str]) -> None:
        StandIn.made += 1
        self.killed = self.stopped = False

    def ask(self, question: dict[str, object], seconds: float) -> child.Answer:
        if question["name"] == "dies":
            raise ChildDiedError("the process SIGSEGV")
        return {"failed": "RuntimeError: no"} if question["name"] == "fails" else {"rows": []}

    def stop(self) -> None:
        self.stopped = True

    kill = stop


def test_a_group_has_one_process_and_a_failure_a_new_one(monkeypatch):
    monkeypatch.setattr(child, "Child", StandIn)
    monkeypatch.setattr(StandIn, "made", 0)
    worker, made = Worker([]), []
    for name in ("a", "b", "dies", "c", "fails", "d", "another group's"):
        worker.measure(entry(name, "loops" if "group" in name else "ops"), None, 1)
        made.append(StandIn.made)
    assert made == [1, 1, 1, 2, 2, 3, 4]


def test_a_process_that_hangs_is_ended_with_what_it_started(monkeypatch, tmp_path):
    note = tmp_path / "grandchild"
    script = f"sleep 60 & echo $! > {note}; echo '{{}}'; wait"
    real = child.subprocess.Popen
    monkeypatch.setattr(child.subprocess, "Popen", lambda command, **kw: real(["bash", "-c", script], **kw))
    hanging = Child([])
    start = time.monotonic()
    with pytest.raises(ChildDiedError, match="no answer within 0 s"):
        hanging.ask({}, 0.2)
    assert time.monotonic() - start < 10
    deadline = time.monotonic() + 10
    while alive(int(note.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(note.read_text()))


def test_a_failing_measurement_tells_its_first_line(capsys):
    def breaks(bench: Workbench) -> list[dict[str, object]]:
        raise RuntimeError("CUDA error: no kernel image\nmore")

    one = Measurement("breaks", "ops", lambda _: 1.0, breaks)
    assert child.answer(Workbench.at(CPU, TINY), one) == {"failed": "RuntimeError: CUDA error: no kernel image"}
    assert "Traceback" in capsys.readouterr().err


def test_agreement_is_measured_against_rounding():
    (row,) = agreement.agreement(Workbench.at(CPU, TINY), Sampling("tiny", 2, 0))
    assert row["agrees"]
    assert 1e-8 < row["rounding"] < 1e-5  # float32 against float64
    assert row["difference"] <= 2 * row["rounding"]


def test_a_loop_that_forgets_a_step_does_not_agree(monkeypatch):
    step, taken = SamplingLoop.take_step, []

    def forgetful(self, stage, parts):
        taken.append(1)
        if len(taken) == 2 * agreement.STEPS + 10:  # of the third loop, which is the one compared
            stage.step += 1
        else:
            step(self, stage, parts)

    monkeypatch.setattr(SamplingLoop, "take_step", forgetful)
    (row,) = agreement.agreement(Workbench.at(CPU, TINY), Sampling("tiny", 2, 0))
    assert not row["agrees"]
    assert row["difference"] > 100 * row["rounding"]
