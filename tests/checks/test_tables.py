"""Each fault planted into a schedule or a sampler's rows is named by the right stage and file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from ddpm_fast import config as names
from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.checks.sampling import check_tables
from ddpm_fast.checks.tables import check_schedule
from ddpm_fast.config import DiffusionConfig, UNetConfig
from ddpm_fast.diffusion import samplers, schedule
from ddpm_fast.diffusion.samplers import SamplerTable
from tests.checks.planting import list_of_faults

UNET = UNetConfig(3, 4, 8, 4, (1, 2), res_blocks=1, attention_resolutions=(2,), dropout=0.3, groups=2)
DIFFUSION = DiffusionConfig(60, "cosine")
SCHEDULE, TABLE = "diffusion/schedule.py", "diffusion/samplers.py"
LOOP, OPS, MODEL = "engine/sampling.py", "ops/reference.py", "model/unet.py"
FAULTS, fault = list_of_faults()


def everything(diffusion: DiffusionConfig = DIFFUSION) -> Iterator[CheckResult]:
    yield from check_schedule(diffusion, schedule.training_table(diffusion))
    yield from check_tables(diffusion)


def unusual(results: Iterator[CheckResult]) -> list[CheckResult]:
    return [result for result in results if not result.passed]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_sound_tables_pass(prediction, clip, variance):
    diffusion = DiffusionConfig(40, "sigmoid", prediction=prediction, clip=clip, variance=variance)
    assert unusual(everything(diffusion)) == []


@pytest.mark.parametrize("timesteps", [1, 2])
def test_few_timesteps_pass(timesteps):
    assert unusual(everything(DiffusionConfig(timesteps, "cosine"))) == []


def with_rows(monkeypatch: pytest.MonkeyPatch, sampler: str, change: Callable[[Any], Any]) -> None:
    rows = getattr(samplers, sampler)
    monkeypatch.setattr(samplers, sampler, lambda *arguments: change(rows(*arguments)))


def with_table(monkeypatch: pytest.MonkeyPatch, change: Callable[[SamplerTable], SamplerTable]) -> None:
    table = samplers.sampler_table
    monkeypatch.setattr(samplers, "sampler_table", lambda *arguments: change(table(*arguments)))


@fault("schedule", SCHEDULE)
def cosine_without_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    cosine = schedule.cosine_betas
    monkeypatch.setattr(schedule, "cosine_betas", lambda timesteps: cosine(timesteps, 0.0))


@fault("schedule", SCHEDULE)
def square_root_forgotten_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    table = schedule.training_table
    square = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(
        schedule, "training_table", lambda *arguments, **options: table(*arguments, **options) ** square
    )


@fault("sampler", TABLE)
def sign_flipped_in_ddim(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rows(monkeypatch, "ddim_rows", lambda row: row._replace(next_from_prediction=-row.next_from_prediction))


@fault("sampler", TABLE)
def eta_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = samplers.ddim_rows
    monkeypatch.setattr(samplers, "ddim_rows", lambda *given: rows(*given[:3]))


@fault("sampler", TABLE)
def first_order_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(row):
        gain = row.next_from_x0 + row.next_from_x0_prev
        return row._replace(next_from_x0=gain, next_from_x0_prev=torch.zeros_like(gain))

    with_rows(monkeypatch, "dpm_solver_rows", change)


@fault("sampler", TABLE)
def ratio_of_steps_upside_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(row):
        gain = row.next_from_x0 + row.next_from_x0_prev
        extrapolation = -row.next_from_x0_prev / gain
        turned = torch.where(extrapolation > 0, 0.25 / extrapolation, 0)
        return row._replace(next_from_x0=gain * (1 + turned), next_from_x0_prev=-gain * turned)

    with_rows(monkeypatch, "dpm_solver_rows", change)


@fault("variance", TABLE)
def variances_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = samplers.ddpm_rows
    monkeypatch.setattr(samplers, "ddpm_rows", lambda a, t, prediction, variance: rows(a, t, prediction, "small"))


@fault("variance", TABLE)
def noise_in_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(row):
        row.noise[-1] = row.noise[-2]
        return row

    with_rows(monkeypatch, "ddpm_rows", change)


@fault("sampler", TABLE)
def posterior_mean_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rows(
        monkeypatch,
        "ddpm_rows",
        lambda row: row._replace(next_from_x0=row.next_from_x, next_from_x=row.next_from_x0),
    )


@fault("sampler", TABLE)
def clip_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    with_table(monkeypatch, lambda table: replace(table, clip=False))


@fault("sampler", TABLE)
def timesteps_unlike_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    table = samplers.sampler_table
    monkeypatch.setattr(samplers, "sampler_table", lambda d, *rest: table(replace(d, timesteps=d.timesteps - 1), *rest))


@fault("sampler", TABLE)
def table_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_table(monkeypatch, lambda table: replace(table, rows=table.rows.flip(0)))


@fault("sampler", TABLE)
def t_one_too_high_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    with_table(monkeypatch, lambda table: replace(table, rows=table.rows + torch.eye(8, dtype=torch.float64)[0]))


@fault("sampler", TABLE)
def a_row_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    with_table(monkeypatch, lambda table: replace(table, rows=table.rows[:-1]))


@fault("sampler", TABLE)
def timesteps_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        samplers, "strided_timesteps", lambda total, steps, spacing: total - 1 - torch.arange(steps) * (total // steps)
    )


@pytest.mark.parametrize(("plant", "stage", "file"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS])
def test_a_planted_fault_is_named(monkeypatch, plant, stage, file):
    plant(monkeypatch)
    first = next(result for result in everything() if result.verdict is Verdict.WRONG)
    assert first.stage == stage
    assert file in first.file


@contextmanager
def a_name_of_somebodys_own(monkeypatch: pytest.MonkeyPatch, kind: str, *allowed: str) -> Iterator[None]:
    """Let configurations hold names that the textbook lacks."""
    monkeypatch.setattr(names, kind, names.Literal[allowed])  # pyright: ignore
    monkeypatch.setattr(names, "require_types", lambda part: None)
    table = samplers.sampler_table

    def with_mine(diffusion, sampler=samplers.PAPER):  # "mine" has the rows of dpm++
        return table(diffusion, replace(sampler, sampler="dpm++") if sampler.sampler == "mine" else sampler)

    monkeypatch.setattr(samplers, "sampler_table", with_mine)
    yield


def test_a_sampler_of_somebodys_own_is_only_said(monkeypatch):
    with a_name_of_somebodys_own(monkeypatch, "SamplerName", "ddpm", "ddim", "dpm++", "mine"):
        results = unusual(everything())
    assert {(result.verdict, result.stage) for result in results} == {(Verdict.CHANGED, "sampler")}
    assert all("mine" in result.name for result in results)


def test_a_sampler_of_somebodys_own_that_does_not_end_on_the_data_fails(monkeypatch):
    with_rows(monkeypatch, "dpm_solver_rows", lambda row: row._replace(x0_from_x=row.x0_from_x * 1.1))
    with a_name_of_somebodys_own(monkeypatch, "SamplerName", "mine"):
        mine = [result for result in unusual(check_tables(DIFFUSION)) if "mine" in result.name]
    assert [result.verdict for result in mine] == [Verdict.WRONG] * len(mine) != []


def test_a_schedule_of_somebodys_own_is_only_said(monkeypatch):
    with a_name_of_somebodys_own(monkeypatch, "SamplerName", "ddpm", "ddim", "dpm++"):
        cubic = DiffusionConfig(60, "cubic")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(schedule, "betas", lambda config: torch.linspace(0.05, 0.5, config.timesteps).double() ** 2)
    results = unusual(everything(cubic))
    assert [(result.verdict, result.stage) for result in results] == [(Verdict.CHANGED, "schedule")]


def test_a_short_schedule_is_said_and_no_fault():
    results = unusual(everything(DiffusionConfig(20)))
    assert [(result.verdict, result.name) for result in results] == [(Verdict.CHANGED, "the schedule ends in noise")]
