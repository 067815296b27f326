"""One whole visit on a CPU, for which `make test` has no time: `pytest bench/test_visit.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_visit_runs_through_and_says_that_a_test_failed(tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_failing():\n    assert False\n")
    out = tmp_path / "out"
    command = [str(ROOT / "bench" / "visit.sh"), "--minutes", "1.5", "--out", str(out), "--tests", str(failing)]
    command += ["--device", "cpu", "--sizes", "tiny", "--only", "training/tiny-batch2/eager"]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines()[-1].startswith("FAILED tests (1 failed in ")
    measured = json.loads((out / "report.json").read_text())["measurements"]
    assert list(measured) == ["ceilings", "training/tiny-batch2/eager-reference"]
    assert all("rows" in entry for entry in measured.values())
    assert {"report.json", "report.md", "visit.log"} < {path.name for path in out.iterdir()}
