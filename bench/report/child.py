"""Measuring in processes of their own, which may die: a failed capture or an illegal address spoils a process for good.

    python -m bench.report.child DEVICE SIZES

says first what machine it is on, then reads questions, which name a measurement each, and answers with its rows. All of
these are lines of JSON.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.peers.comparison import one_line
from bench.report.budget import Measurement
from bench.report.plan import plan
from bench.report.sizes import SIZES
from bench.report.workbench import Workbench
from bench.timing.machine import machine
from bench.work.figures import Ceilings

START_SECONDS = 120.0
"""Until a process must have said its first word."""
STOP_SECONDS = 20.0
"""For a process to end by itself."""

Answer = dict[str, Any]


class ChildDiedError(Exception):
    """A measuring process ended or was ended before it answered."""


def first_word(workbench: Workbench) -> Answer:
    """Return what a report says of its machine."""
    return {"machine": machine(workbench.device), "dtype": str(workbench.dtype).removeprefix("torch.")}


def answer(workbench: Workbench, measurement: Measurement) -> Answer:
    """Make one measurement: its rows, or why there are none."""
    try:
        return {"rows": measurement.run(workbench)}
    except Exception as error:  # a visit costs too much to end at the first failure
        traceback.print_exc()
        return {"failed": one_line(error)}


def main(kind: str, sizes: str) -> None:
    """Answer until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    workbench = Workbench.at(torch.device(kind), SIZES[sizes])
    torch.manual_seed(0)
    print(json.dumps(first_word(workbench)), file=answers)
    planned: dict[str, Measurement] = {}
    for line in sys.stdin:
        question = json.loads(line)
        workbench.ceilings = Ceilings(**question["ceilings"]) if question["ceilings"] else None
        planned = planned or {one.name: one for one in plan(kind, workbench.sizes, question["packages"])}
        print(json.dumps(answer(workbench, planned[question["name"]])), file=answers)


class Child:
    """The other end: one measuring process."""

    def __init__(self, arguments: list[str]) -> None:
        """Start it and hear its first word.

        Raises:
            ChildDiedError: it says none; why stands on standard error.
        """
        # A session of its own, so that it can be ended with all that it started: compilers' workers too.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.report.child", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self.first_word = self._hear(START_SECONDS)

    def ask(self, question: dict[str, Any], seconds: float) -> Answer:
        """Have a measurement made.

        Raises:
            ChildDiedError: the process died, or had no answer within so many seconds.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: what follows finds out
            print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._hear(seconds)

    def _hear(self, seconds: float) -> Answer:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, seconds))[0]:
            self.kill()
            raise ChildDiedError(f"no answer within {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)  # to learn how it ended
            self.kill()
            code = self.process.returncode
            how = f"exited with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
            raise ChildDiedError(f"the process {how}")
        return json.loads(line)

    def stop(self) -> None:
        """Let it end, or end it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Worker:
    """Has measurements made: a process a group, and a new one after each failure."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.packages: list[str] = []  # of the peers, those that can be imported
        self.child: Child | None = None
        self.group: str | None = None

    def first_word(self) -> Answer:
        """Return what a process says of its machine."""
        self.child = self.child or Child(self.arguments)
        return self.child.first_word

    def measure(self, measurement: Measurement, ceilings: Ceilings | None, seconds: float) -> Answer:
        """Have a measurement made within so many seconds: its rows, or why there are none."""
        if self.group not in (None, measurement.group):
            self.close()
        self.group = measurement.group
        question = {"name": measurement.name, "packages": self.packages}
        question["ceilings"] = asdict(ceilings) if ceilings else None
        try:
            self.child = self.child or Child(self.arguments)
            found = self.child.ask(question, seconds)
        except ChildDiedError as error:
            found = {"failed": str(error)}
        if "failed" in found and self.child is not None:
            self.child.kill()  # a broken one may hang at its exit
            self.child = self.group = None
        return found

    def close(self) -> None:
        """End the process, if there is one."""
        if self.child is not None:
            self.child.stop()
        self.child = self.group = None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
