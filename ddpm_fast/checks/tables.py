"""Do the schedule and each sampler's table say what the textbook says?

The textbook's own samplers run here, in float64, but their network and their random numbers are ours: at each step the
network puts given numbers in place of x and returns a given prediction. So every row is judged by itself, and a wrong
one spoils no other. The rows are those of the engine's alpha_bar: a wrong schedule is told once, not by every sampler.
Shapes: T timesteps, K rows, W numbers per row.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_fast import textbook
from ddpm_fast.checks.results import CheckResult, Stage, Verdict, judged
from ddpm_fast.config import DiffusionConfig, SamplerConfig
from ddpm_fast.constants import Row, TrainingTable
from ddpm_fast.diffusion import samplers
from ddpm_fast.diffusion.samplers import SamplerTable

KNOWN_SCHEDULES, KNOWN_PREDICTIONS = ("linear", "cosine", "sigmoid"), ("eps", "x0", "v")
KNOWN_VARIANCES, KNOWN_SAMPLERS = ("large", "small"), ("ddpm", "ddim", "dpm++")
"""What the textbook has. Other names are somebody's own, and checked for consistency only."""
NUMBERS = 16
"""Per row: half of them with noise, half without, which tells a wrong variance from a wrong mean."""
ENDS_IN_NOISE, NOTHING = 0.01, 1e-60
"""Values of alpha_bar: at the end of a usual schedule, and where float32 has long given up."""
SCHEDULE, TABLE = "ddpm_fast/diffusion/schedule.py", "ddpm_fast/diffusion/samplers.py"


def check_schedule(diffusion: DiffusionConfig, training_table: Tensor) -> Iterator[CheckResult]:
    """Check alpha_bar, as sampling and as training have it.

    Args:
        diffusion: the run's.
        training_table: [T, 5], which the trainer holds.
    """
    total, alpha_bar = diffusion.timesteps, samplers.make_alpha_bar(diffusion)
    known = diffusion.schedule in KNOWN_SCHEDULES
    truth = textbook.ForwardProcess(diffusion).alpha_bar if known else alpha_bar
    some = (truth if known else torch.ones(total)) > NOTHING  # below, too little is left to be compared
    falling = torch.cat([alpha_bar.new_ones(1), alpha_bar]).diff() < 0
    right = len(alpha_bar) == total and bool(((falling & (alpha_bar > 0)) | ~some).all())
    name, expected = "alpha_bar falls from 1 towards 0", f"{total} values, falling"
    text = expected if right else f"{len(alpha_bar)} values, of which {int(falling.sum())} fall"
    yield CheckResult("schedule", name, judged(right), expected, text, SCHEDULE)
    if not right:
        return
    if known:
        off = torch.where(some, (alpha_bar / truth).log().abs(), 0)
        right, t = float(off.max()) < 1e-6, int(off.argmax())
        name, text = f"the {diffusion.schedule} schedule is the textbook's", f"{float(off[t]):.1e} off at t = {t}"
        yield CheckResult("schedule", name, judged(right), "alpha_bar within 1e-6 of itself", text, SCHEDULE)
    else:
        yield unknown("schedule", diffusion.schedule, "alpha_bar falls, as it must", SCHEDULE)
    last = float(alpha_bar[-1])
    verdict = judged(last < ENDS_IN_NOISE, Verdict.CHANGED)
    name, expected = "the schedule ends in noise", f"at most {ENDS_IN_NOISE} of the image left at t = {total - 1}"
    yield CheckResult("schedule", name, verdict, expected, f"{last:.2g}", f"{SCHEDULE}, --timesteps or --beta-end")
    yield _check_training_table(alpha_bar, training_table)


def _check_training_table(alpha_bar: Tensor, training_table: Tensor) -> CheckResult:
    """Check that training mixes image and noise by the alpha_bar [T] of sampling."""
    name = "training adds the noise that sampling takes away"
    row, total = TrainingTable(*training_table.double().cpu().unbind(1)), len(alpha_bar)
    if len(row.signal) != total:
        expected, text = f"{total} timesteps", f"{len(row.signal)} in training"
        return CheckResult("schedule", name, judged(False), expected, text, SCHEDULE)
    off = torch.maximum((row.signal - alpha_bar.sqrt()).abs(), (row.noise - (1 - alpha_bar).sqrt()).abs()).max()
    expected, text = "one alpha_bar for both", f"{float(off):.1e} off"
    return CheckResult("schedule", name, judged(float(off) < 1e-6), expected, text, SCHEDULE)


def unknown(stage: Stage, what: str, consistency: str, file: str) -> CheckResult:
    """Say that the textbook lacks a name."""
    name = f"the textbook has no {stage} {what!r}"
    return CheckResult(stage, name, Verdict.CHANGED, "one of the textbook's", consistency, file)


def name_of(sampler: SamplerConfig, table: SamplerTable) -> str:
    """Say which sampler it is."""
    eta = f" with eta {sampler.eta:g}" if sampler.eta else ""
    return f"{sampler.sampler}{eta} in {len(table.rows)} {sampler.spacing} steps"


def visited(total: int, sampler: SamplerConfig) -> Tensor:
    """Return the timesteps that the textbook has a sampler visit, ascending: [K]."""
    steps = sampler.steps or total
    all_but_0 = sampler.sampler == "dpm++" and sampler.spacing != "trailing" and steps < total
    return textbook.choose_timesteps(total, steps + all_but_0, sampler.spacing)[int(all_but_0) :]


def check_timesteps_of(diffusion: DiffusionConfig, sampler: SamplerConfig, table: SamplerTable) -> CheckResult:
    """Check which timesteps the network is told."""
    expected = visited(diffusion.timesteps, sampler).flip(0)
    t = Row(*table.rows.unbind(1)).t
    name = f"{name_of(sampler, table)} visits the right timesteps"
    right = torch.equal(t, expected.double())
    return CheckResult("sampler", name, judged(right), _ends(expected), _ends(t), TABLE)


def _ends(t: Tensor) -> str:
    shown = [f"{float(value):g}" for value in t]
    return ", ".join(shown if len(shown) < 5 else [*shown[:3], "...", shown[-1]])


class Given(NamedTuple):
    """The numbers that steps start from, all of one shape, float64."""

    x: Tensor
    prediction: Tensor
    z: Tensor


def rows_of(rows: Tensor, noisy: bool, multistep: bool) -> Row[Tensor]:
    """Return the columns of rows [K, 8], [K, 1] float64 each, without what a loop leaves out by its table's flags."""
    row = Row(*(column[:, None] for column in rows.double().unbind(1)))
    row = row if noisy else row._replace(noise=torch.zeros_like(row.noise))
    return row if multistep else row._replace(next_from_x0_prev=torch.zeros_like(row.noise))


def x0_of(row: Row[Tensor], clip: bool, given: Given) -> tuple[Tensor, Tensor]:
    """Return what a row makes of the prediction, and the sum of the sizes of its terms, which rounding goes with."""
    from_x, from_prediction = row.x0_from_x * given.x, row.x0_from_prediction * given.prediction
    x0 = from_x - from_prediction
    return x0.clamp(-1, 1) if clip else x0, from_x.abs() + from_prediction.abs()


def next_of(row: Row[Tensor], x0: Tensor, x0_prev: Tensor, given: Given) -> tuple[Tensor, Tensor]:
    """Return a row's next x (the equation at the top of `diffusion.samplers`), and the sum of its terms' sizes."""
    terms = torch.stack(
        [
            row.next_from_x0 * x0,
            row.next_from_x * given.x,
            row.next_from_prediction * given.prediction,
            row.next_from_x0_prev * x0_prev,
            row.noise * given.z,
        ]
    )
    return terms.sum(0), terms.abs().sum(0)


def take_rows(table: SamplerTable, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Take every row of a table at once, each from given numbers [K, W] and the x0 of the row before.

    Returns:
        x0, the next x, and what their rounding goes with: [K, W] float64.
    """
    row = rows_of(table.rows, table.noisy, table.multistep)
    x0, x0_size = x0_of(row, table.clip, given)
    x0_prev = torch.cat([torch.zeros_like(x0[:1]), x0[:-1]])
    reached, size = next_of(row, x0, x0_prev, given)
    return x0, reached, size + row.next_from_x0.abs() * x0_size


class Replay(nn.Module):
    """Stands where the textbook's U-Net and random numbers stand, and notes how far it has come at each step."""

    def __init__(self, given: Given) -> None:
        super().__init__()
        self.given, self.reached = given, list[Tensor]()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        step = len(self.reached)
        self.reached.append(x.clone())
        x.copy_(self.given.x[step].view_as(x))
        return self.given.prediction[step].view_as(x)

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        return self.given.z[len(self.reached) - 1].view(shape)


def process_of(diffusion: DiffusionConfig, sampler: SamplerConfig) -> textbook.ForwardProcess:
    """Return the textbook's process of the visited timesteps, with the engine's alpha_bar."""
    t = visited(diffusion.timesteps, sampler)
    any_schedule = replace(diffusion, schedule="linear")  # the textbook may not know the run's
    process, alpha_bar = textbook.ForwardProcess(any_schedule, t), samplers.make_alpha_bar(diffusion)
    process.alpha_bar = alpha_bar[t.clamp(max=len(alpha_bar) - 1)]
    process.alpha_bar_prev = torch.cat([torch.ones_like(process.alpha_bar[:1]), process.alpha_bar[:-1]])
    return process


def textbook_steps(process: textbook.ForwardProcess, sampler: SamplerConfig, given: Given) -> Tensor:
    """Return where the textbook's sampler comes to by each step from the given numbers: [K, W] float64."""
    replay, x = Replay(given), given.x[0].clone().view(1, 1, 1, -1)
    if sampler.sampler == "ddpm":
        last = textbook.sample_ddpm(replay, x, process, replay)
    elif sampler.sampler == "ddim":
        last = textbook.sample_ddim(replay, x, process, sampler.eta, replay)
    else:
        last = textbook.sample_dpm_solver(replay, x, process)
    return torch.cat([*replay.reached[1:], last]).view(len(given.x), -1)


def _given(steps: int) -> Given:
    generator = torch.Generator().manual_seed(0)
    x, prediction, z = torch.randn(3, steps, NUMBERS, generator=generator, dtype=torch.float64)
    z[:, : NUMBERS // 2] = 0
    return Given(2 * x, prediction, z)


def _rounding(process: textbook.ForwardProcess) -> Tensor:
    """Return by which share of itself a result of each row may be off, [K, 1]: more where betas are tiny."""
    alpha_bar, before = process.alpha_bar.flip(0), process.alpha_bar_prev.flip(0)
    return (1e-6 + 1e-14 / torch.minimum(1 - alpha_bar, 1 - alpha_bar / before))[:, None]


def check_rows(diffusion: DiffusionConfig, sampler: SamplerConfig, table: SamplerTable) -> CheckResult:
    """Check that each row does what the textbook's step does."""
    steps, process = sampler.steps or diffusion.timesteps, process_of(diffusion, sampler)
    name, expected = f"{name_of(sampler, table)} is the textbook's", f"each of {steps} rows within 1e-6"
    if len(table.rows) != steps:
        return CheckResult("sampler", name, judged(False), f"{steps} rows", f"{len(table.rows)}", TABLE)
    given = _given(steps)
    x0, reached, sizes = take_rows(table, given)
    truth = textbook_steps(process, sampler, given)
    wrong = ~((reached - truth).abs() <= _rounding(process) * sizes)  # NaN is wrong, too
    wrong &= process.alpha_bar.flip(0)[:, None] > NOTHING
    if not bool(wrong.any()):
        return CheckResult("sampler", name, judged(True), expected, expected, TABLE)
    row = int(wrong.any(1).int().argmax())
    still = NUMBERS // 2
    x_start, _ = textbook.predict(
        Replay(Given(*(part[row : row + 1] for part in given))),
        given.x[row].clone().view(1, 1, 1, -1),
        steps - 1 - row,
        process,
    )
    only_noise = not bool(wrong[row, :still].any())
    bad_x0 = float((x0[row] - x_start.flatten()).abs().max()) > 1e-6 * float(sizes[row].max())
    part = "the noise" if only_noise else "x0" if bad_x0 else "the next x"
    off = float((reached - truth)[row].abs().max())
    found = f"{part} is {off:.1e} off in row {row} (t = {float(table.rows[row, 0]):g})"
    stage: Stage = "variance" if only_noise and sampler.sampler == "ddpm" else "sampler"
    return CheckResult(stage, name, judged(False), expected, found, TABLE)
