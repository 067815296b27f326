"""What a sweep consists of, and how its runs are ranked."""

import json

import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.runs import evaluation
from ddpm_fast.runs.compare import open_run
from ddpm_fast.runs.sweep import Plan, ranking, read_grid, read_plan, verdict_of
from tests.runs.test_compare import evaluated, recorded


def test_all_combinations_are_tried_once():
    grid = read_grid(["--learning-rate", "1e-3", "2e-3", "--prediction=v", "--flip", "true", "false"])
    assert grid == {"learning-rate": ["1e-3", "2e-3"], "prediction": ["v"], "flip": ["true", "false"]}
    combinations = Plan("base", grid).combinations()
    assert list(combinations) == [
        f"learning-rate={rate},prediction=v,flip={flip}" for rate in ("1e-3", "2e-3") for flip in ("true", "false")
    ]
    assert combinations["learning-rate=2e-3,prediction=v,flip=false"] == [
        *("--learning-rate", "2e-3", "--prediction", "v", "--no-flip")
    ]


def test_a_list_is_one_value_and_no_directory_is_left():
    plan = Plan("base", read_grid(["--channel_multipliers", "1,2", "1,2,2"]))
    assert plan.combinations()["channel-multipliers=1,2,2"] == ["--channel-multipliers", "1", "2", "2"]
    assert list(Plan("base", {"x": ["a/b"]}).combinations()) == ["x=a-b"]
    long = [",".join(["1"] * 200), ",".join(["2"] * 200)]
    names = list(Plan("base", {"channel-multipliers": long}).combinations())
    assert len(set(names)) == 2
    assert max(map(len, names)) < 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1e-3"], "stands before any flag"),
        (["--flip"], "--flip has no value to try"),
        (["--steps", "5", "5"], "names a value twice"),
        (["--data", "photos"], "--data decides which images"),
        (["--holdout=0.1"], "--holdout decides which images"),
        (["--seed", "1"], "--seed decides which images and noise"),
        (["--flip", "true", "--flip=false"], "--flip is named twice"),
    ],
)
def test_what_cannot_be_tried_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        read_grid(arguments)


def test_a_plan_comes_back(tmp_path):
    plan = Plan("runs/digits-1", {"learning-rate": ["1e-3", "2e-3"]})
    plan.write(tmp_path)
    assert read_plan(tmp_path) == plan
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(InputError, match="missing or damaged"):
        read_plan(tmp_path)
    with pytest.raises(InputError, match="missing or damaged"):
        read_plan(tmp_path / "none")


def test_the_lowest_loss_comes_first(tmp_path):
    base = open_run(recorded(tmp_path / "base"))
    runs = [open_run(recorded(tmp_path / name, shift=shift)) for name, shift in (("worse", 1), ("better", -1))]
    (tmp_path / "better/verdict.json").write_text(json.dumps({"verdict": "lower"}))
    header, first, second = ranking(base, runs)
    assert first.startswith("better")
    assert "lower" in first
    assert "-" in first
    assert second.startswith("worse")
    assert "unfinished" in second
    assert header.index("sigma") < header.index("verdict")
    assert (verdict_of(runs[1].path), verdict_of(runs[0].path)) == ("lower", None)


def test_a_run_that_was_never_evaluated_is_listed(tmp_path):
    base, run = open_run(recorded(tmp_path / "base")), recorded(tmp_path / "run")
    evaluation.cut_back(run, 0)
    evaluation.write(run, 5, evaluated(torch.rand(128)))  # a step that the base lacks
    assert ranking(base, [open_run(run)])[1].startswith("run")
