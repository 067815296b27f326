"""What differs between two runs, and the paired difference of their evaluations."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_rel

from ddpm_fast.config import Config, DiffusionConfig, with_training
from ddpm_fast.errors import InputError
from ddpm_fast.presets import PRESETS
from ddpm_fast.runs import evaluation, origin
from ddpm_fast.runs.compare import (
    Difference,
    changed_code,
    difference,
    differences,
    not_paired,
    open_run,
    table,
    what_differs,
    what_will_differ,
)
from ddpm_fast.runs.directory import prepare
from ddpm_fast.runs.evaluation import Evaluation

DIGITS = replace(PRESETS["digits"], diffusion=DiffusionConfig(schedule="cosine"))
DIGITS = with_training(DIGITS, steps=1200, batch_size=64, warmup_steps=100, cooldown=0.0)
CPU = torch.device("cpu")


def evaluated(errors: torch.Tensor, images: int = 1000) -> Evaluation:
    """Return an evaluation whose averaged weights have these errors; the last ones' are 1 larger."""
    count = len(errors)
    numbers = torch.arange(count) % images
    return Evaluation({"ema": errors, "raw": errors + 1}, numbers, evaluation.log_snrs(count).float())


def compared(step: int, base: torch.Tensor, other: torch.Tensor, images: int = 1000) -> Difference:
    found = difference(step, evaluated(base, images), evaluated(other, images))
    assert found is not None
    return found


def recorded(directory: Path, config: Config = DIGITS, shift: float = 0.0, fingerprint: str = "data") -> Path:
    """Write what a run leaves that a comparison reads; its errors are `shift` larger at each address."""
    prepare(directory, config, fingerprint, 0)
    origin.write(directory, 0, CPU)
    for step in (10, 100):
        errors = torch.rand(evaluation.examples_at(step), generator=torch.Generator().manual_seed(step)) + 1
        noise = 0.1 * torch.rand(len(errors), generator=torch.Generator().manual_seed(step + 1))
        errors = errors + shift * noise
        evaluation.write(directory, step, evaluated(errors))
    lines = [
        {"step": step, "loss": 1.0, "wall": {"images_per_s": rate}} for step, rate in ((50, 1), (100, 7), (150, 9))
    ]
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return directory


def test_the_paired_difference_is_students():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(512, generator=generator)
    other = base * 0.9 + 0.05 * torch.rand(512, generator=generator)
    found, student = compared(7, base, other), ttest_rel(other.double().numpy(), base.double().numpy())
    assert found.sigmas == pytest.approx(student.statistic, rel=1e-9)
    assert found.mean == pytest.approx(float((other - base).mean()), rel=1e-4)
    counts = evaluation.bands(512).bincount().double() / 512
    assert sum(value * share for value, share in zip(found.bands, counts.tolist(), strict=True)) == pytest.approx(
        found.mean, rel=1e-9
    )


def test_only_common_addresses_count():
    base = torch.rand(512)
    other = base[:128] - 0.5
    assert compared(7, base, other).mean == pytest.approx(-0.5, abs=1e-6)
    assert compared(7, base, other).base == pytest.approx(float(base[:128].mean()), rel=1e-6)
    assert difference(7, evaluated(base), replace(evaluated(base), image=torch.arange(512) + 1)) is None


def test_an_image_that_comes_often_counts_once():
    """Errors that belong to images: the standard error is that of the images' means."""
    of_image = torch.randn(32, generator=torch.Generator().manual_seed(0))
    base = torch.ones(512)
    other = base + of_image[torch.arange(512) % 32] * 0.01
    student = ttest_rel((1 + 0.01 * of_image).double().numpy(), torch.ones(32).double().numpy())
    assert compared(7, base, other, images=32).sigmas == pytest.approx(student.statistic, rel=1e-3)
    assert abs(compared(7, base, other).sigmas) > 3 * abs(student.statistic)


def test_only_addresses_of_the_same_noise_level_count():
    """A shorter schedule cannot show a noisier x_t: there its errors are those of another noise level."""
    base, other = evaluated(torch.ones(512)), evaluated(torch.ones(512))
    far = other.log_snr < -5
    other.errors["ema"][far] = 5.0
    other.log_snr[far] = -5.0
    found = difference(7, base, other)
    assert found is not None
    assert (found.mean, found.sigmas) == (pytest.approx(0.078, abs=0.02), pytest.approx(1, abs=3))
    near = (base.log_snr + 5).abs() <= 0.25
    assert found.addresses == int((~far).sum() + (far & near).sum()) < 512


def test_rounding_is_told_from_a_difference():
    base = torch.rand(512, generator=torch.Generator().manual_seed(0)) + 1
    found = compared(100, base, base * (1 + 1e-6))
    assert abs(found.sigmas) > 5
    assert found.is_rounding
    assert "equal but for rounding" in str(found)
    assert not compared(100, base, base * (1 + 1e-3)).is_rounding


def test_a_run_against_itself_differs_by_exactly_nothing(tmp_path):
    run = open_run(recorded(tmp_path / "run"))
    for one in differences(run, run):
        assert (one.mean, one.standard_error, one.sigmas, one.bands) == (0, 0, 0, [0] * evaluation.BANDS)
        assert str(one) == "evaluation loss exactly equal"
    assert what_differs(run, run) == ["nothing: one configuration, one code, one machine"]


def test_a_difference_is_said_with_its_sign(tmp_path):
    base, other = open_run(recorded(tmp_path / "a")), open_run(recorded(tmp_path / "b", shift=-1))
    found = differences(base, other)
    assert [one.step for one in found] == [10, 100]
    assert all(one.mean < 0 and one.sigmas < -5 for one in found)
    assert "lower" in str(found[-1])
    assert all("higher" in str(one) for one in differences(other, base))
    assert len(table(base, other)) == 3
    assert base.images_per_s == 8


def test_what_differs_is_named(tmp_path):
    changed = replace(DIGITS, diffusion=replace(DIGITS.diffusion, prediction="v"))
    base, other = open_run(recorded(tmp_path / "a")), open_run(recorded(tmp_path / "b", changed))
    assert what_differs(base, other) == ["--prediction: eps -> v"]
    assert other.origin is not None
    other.origin.sources["diffusion/schedule.py"] += "# one more\n"
    other.origin.facts["versions"]["torch"] = "9.9"
    lines = what_differs(base, other)
    assert "code: ddpm_fast/diffusion/schedule.py (+1 -0 lines)" in lines
    assert any(line.startswith("torch: ") and line.endswith(" -> 9.9") for line in lines)
    (file,) = changed_code(base, other)
    assert "+# one more" in file.lines


def test_what_will_differ_is_one_line_before_the_first_step(tmp_path):
    base = open_run(recorded(tmp_path / "a"))
    assert what_will_differ(base, DIGITS) == f"nothing differs from {base.path}: same flags, same code"
    changed = replace(DIGITS, diffusion=replace(DIGITS.diffusion, prediction="v"))
    assert what_will_differ(base, changed) == f"differs from {base.path} in --prediction: eps -> v"
    assert base.origin is not None
    base.origin.sources["diffusion/schedule.py"] += "# one less\n"
    line = "ddpm_fast/diffusion/schedule.py (+0 -1 lines)"
    assert what_will_differ(base, changed).endswith(f"in --prediction: eps -> v; {line}")
    base.origin.sources.clear()
    assert re.search(
        r" in ddpm_fast/constants.py .*; ddpm_fast/diffusion/.*; \d+ more source files$", what_will_differ(base, DIGITS)
    )
    shutil.rmtree(base.path / "origin")
    again = open_run(base.path)
    assert what_will_differ(again, DIGITS) == (
        f"nothing differs from {base.path}: same flags (the code of {base.path} is not on record)"
    )


def test_code_that_is_not_on_record_is_said(tmp_path):
    base, other = recorded(tmp_path / "a"), recorded(tmp_path / "b")
    shutil.rmtree(other / "origin")
    assert what_differs(open_run(base), open_run(other)) == [f"code: not on record of {other}"]


def test_other_images_are_not_paired(tmp_path):
    base, other = open_run(recorded(tmp_path / "a")), open_run(recorded(tmp_path / "b", fingerprint="others"))
    assert not_paired(base, other) == "they are of other images"
    assert table(base, other) == ["no paired difference: they are of other images"]
    held_out = open_run(recorded(tmp_path / "c", replace(DIGITS, data=replace(DIGITS.data, holdout=0.1))))
    assert table(base, held_out) == ["no paired difference: they hold out other images"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_run(tmp_path / "none")
    with pytest.raises(InputError, match=r"config\.json is missing or torn"):
        open_run(tmp_path)
