"""What holds for any schedule, prediction and sampler, whether or not the textbook has its name."""

import torch
from torch import Tensor

from ddpm_fast.checks.results import CheckResult, Verdict, judged
from ddpm_fast.checks.tables import KNOWN_SAMPLERS, KNOWN_VARIANCES, NOTHING, TABLE, Given, name_of, take_rows
from ddpm_fast.config import DiffusionConfig, SamplerConfig
from ddpm_fast.constants import Row, TrainingTable
from ddpm_fast.diffusion import samplers, schedule
from ddpm_fast.diffusion.samplers import SamplerTable

NUMBERS = 16


def check_consistency(diffusion: DiffusionConfig, sampler: SamplerConfig, table: SamplerTable) -> CheckResult:
    """Check that a sampler whose network knows the truth finds x_start in every row, and ends on it.

    The truth is what training would ask for at the row's timestep.
    """
    alpha_bar = samplers.make_alpha_bar(diffusion)
    t = Row(*table.rows.unbind(1)).t.long().clamp(0, len(alpha_bar) - 1)
    target = TrainingTable(*schedule.training_table(diffusion, dtype=torch.float64)[t][:, :, None].unbind(1))
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(len(t), NUMBERS, generator=generator, dtype=torch.float64) * 2 - 1
    x_start[:] = x_start[0]  # of one image: some samplers read the last step's x0
    eps = torch.randn(len(t), NUMBERS, generator=generator, dtype=torch.float64)
    x = target.signal * x_start + target.noise * eps
    prediction = target.target_eps * eps + target.target_x_start * x_start
    x0, reached, _ = take_rows(table, Given(x, prediction, torch.zeros_like(x)))
    rounding = 1e-6 + 1e-12 / alpha_bar[t].sqrt()
    lost = (x0 - x_start).abs().amax(1) - rounding
    end = float((reached[-1] - x_start[-1]).abs().max() - rounding[-1])
    right = float(lost.max()) <= 0 and end <= 0
    name = f"{name_of(sampler, table)} ends on the data if the prediction is true"
    found = f"x0 is {float(lost.max()):.1e} off in row {int(lost.argmax())}, the end {end:.1e}"
    verdict = judged(right)
    if right and sampler.sampler not in KNOWN_SAMPLERS:
        verdict, found = Verdict.CHANGED, "so it does, but the textbook lacks it"
    return CheckResult("sampler", name, verdict, "x_start in every row and in the end", found, TABLE)


def check_posterior(diffusion: DiffusionConfig) -> CheckResult:
    """Check the paper's sampler over all T against Bayes' rule, which the textbook does not use.

    q(x_{t-1} | x_0) times q(x_t | x_{t-1}) are two normal densities: their precisions add up.
    """
    name = "a step of the paper's sampler is Bayes' rule"
    row = Row(*samplers.sampler_table(diffusion).rows.flip(0).unbind(1))  # row t now belongs to t
    if len(row.t) != diffusion.timesteps:
        return CheckResult("sampler", name, judged(False), f"{diffusion.timesteps} rows", f"{len(row.t)}", TABLE)
    betas, alpha_bar = schedule.betas(diffusion)[1:], samplers.make_alpha_bar(diffusion)[:-1]
    before = 1 - alpha_bar
    variance = 1 / (1 / before + (1 - betas) / betas)
    from_x0 = variance * alpha_bar.sqrt() / before
    from_x = variance * (1 - betas).sqrt() / betas
    some = alpha_bar > NOTHING
    off = [_off(row.next_from_x0[1:], from_x0, some), _off(row.next_from_x[1:], from_x, some)]
    if diffusion.variance in KNOWN_VARIANCES:
        off.append(_off(row.noise[1:], (variance if diffusion.variance == "small" else betas).sqrt(), some))
    worst = max(off, default=0.0)
    right = worst <= 1e-6 + 1e-13 / float(betas.min() if len(betas) else 1)
    return CheckResult("sampler", name, judged(right), "within 1e-6", f"{worst:.1e} off", TABLE)


def _off(found: Tensor, expected: Tensor, where: Tensor) -> float:
    """Return by which share of itself something is off at most."""
    return float(((found - expected) / expected)[where].abs().max()) if bool(where.any()) else 0.0
