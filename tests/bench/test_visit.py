"""bench/visit.sh: tests, then the report with the minutes left, and a last line that tells what failed."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Takes the place of Python: plays pytest and the report as its environment says, and notes how they were called.
PLAYER = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case $2 in
    pytest) sleep "${TESTS_TAKE:-0}"; echo "$TESTS_SAY"; exit "$TESTS_STATUS" ;;
    bench.report) echo "$REPORT_SAYS"; exit "$REPORT_STATUS" ;;
    bench.timing.machine) echo "$DEFAULT_OUT" ;;
esac
"""


@pytest.fixture
def visit(tmp_path):
    """Run the script with a stand-in for Python; return its result and how Python was called."""
    player = tmp_path / "python"
    player.write_text(PLAYER)
    player.chmod(0o755)
    played = {
        "PYTHON": str(player),
        "CALLS": str(tmp_path / "calls"),
        "TESTS_SAY": "12 passed, 3 skipped in 1.00s",
        "TESTS_STATUS": "0",
        "REPORT_SAYS": "out/report.md: 9 measured, 0 failed, 2 left out",
        "REPORT_STATUS": "0",
        "DEFAULT_OUT": str(tmp_path / "a-gpu"),
    }

    def run(*arguments: str, **changed: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        command = [str(ROOT / "bench" / "visit.sh"), *arguments]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, **played, **changed}
        )
        return result, (tmp_path / "calls").read_text().splitlines()

    return run


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout.splitlines()[-1]


def test_the_tests_come_first_and_the_report_gets_the_minutes_left(visit, tmp_path):
    result, calls = visit("--minutes", "9", "--only", "loops")
    folder = tmp_path / "a-gpu"
    assert result.returncode == 0, result.stderr
    assert last_line(result) == f"DONE {folder}"
    _, tests, report = calls
    assert tests == "-m pytest -q -m gpu -n 8 --dist worksteal"
    *start, minutes, out, path, only, group = report.split()
    assert (start, out, path) == (["-m", "bench.report", "--minutes"], "--out", str(folder))
    assert (only, group) == ("--only", "loops")
    assert 8.5 < float(minutes) <= 9
    assert (folder / "visit.log").read_text() == result.stdout


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"TESTS_STATUS": "1", "TESTS_SAY": "1 failed, 12 passed in 1.00s"}, "tests (1 failed, 12 passed in 1.00s)"),
        ({"TESTS_STATUS": "2", "TESTS_SAY": "5 errors in 1.00s"}, "tests (5 errors in 1.00s)"),
        ({"TESTS_SAY": "80 skipped in 1.00s"}, "tests (none ran: 80 skipped in 1.00s)"),
        ({"REPORT_STATUS": "1", "REPORT_SAYS": "8 measured, 1 failed"}, "report (8 measured, 1 failed)"),
    ],
)
def test_a_failure_is_the_last_lines_first_word_and_stops_nothing(visit, tmp_path, changed, named):
    result, calls = visit("--out", str(tmp_path / "out"), **changed)
    assert result.returncode == 1
    assert last_line(result) == f"FAILED {named}; see {tmp_path / 'out' / 'visit.log'}"
    assert [call.split()[1] for call in calls] == ["pytest", "bench.report"]


def test_tests_that_take_too_long_are_ended(visit, tmp_path):
    result, calls = visit("--out", str(tmp_path / "out"), "--minutes", "0.04", TESTS_TAKE="30")
    assert "tests (not done after 1 s)" in last_line(result)
    assert len(calls) == 2


def test_tests_can_be_left_out_or_chosen(visit, tmp_path):
    out = ("--out", str(tmp_path / "out"))
    _, calls = visit(*out, "--no-tests")
    assert [call.split()[1] for call in calls] == ["bench.report"]
    _, calls = visit(*out, "--tests", "tests/test_ops.py -x")
    assert calls[0] == "-m pytest -q tests/test_ops.py -x"
    _, calls = visit(*out, "--device", "cpu")
    assert [call.split()[1] for call in calls] == ["bench.report"]
    assert calls[0].endswith("--device cpu")
