"""What an H100 would be told to do: nothing that a capture refuses, and what profiles/launches-sm90.md says.

Needs PyTorch's CUDA build in version 2.11, in which `make test-oldest` runs.
"""

from pathlib import Path

import pytest

from bench.launches import page, standin
from bench.launches.__main__ import Scenario, observe

REASON = standin.reason_it_cannot_run()
COLUMNS = page.read(Path(__file__).parents[2] / "profiles" / "launches-sm90.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standin")
    standin.build(folder)
    return folder


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(("task", "replays"), [("sampling", 2 + 3), ("training", 1)])
def test_a_captured_step_waits_for_nothing_and_launches_what_the_page_says(folder, task, replays):
    scenario = Scenario(task, "digits", 64, "kernels")
    found = observe(scenario, folder)
    assert found["refused"] == found["waits"] == found["atomics"] == []
    assert found["replays"] == replays
    assert found["kinds"] == COLUMNS[-1]["scenarios"][scenario.name]["kinds"]


@pytest.mark.parametrize("column", COLUMNS[-1:], ids=lambda column: column["label"])
def test_the_page_shows_no_fault_of_today(column):
    for name, found in column["scenarios"].items():
        assert found["refused"] == found["waits"] == found["atomics"] == [], name
