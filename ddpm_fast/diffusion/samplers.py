"""Samplers as tables: DDPM, DDIM and DPM-Solver++(2M) differ only in the numbers of K rows.

One reverse step, whatever the sampler, with the row's columns as coefficients:

    x0   = x0_from_x * x - x0_from_prediction * prediction          (then clipped to [-1, 1] if asked)
    next = next_from_x0 * x0 + next_from_x * x + next_from_prediction * prediction
           + next_from_x0_prev * x0_prev + noise * z

x is x_t, prediction what the U-Net returned, x0_prev the last step's x0, z fresh noise, t what the U-Net is told.
All rows are computed in float64. alpha_bar is that of this row's t, alpha_bar_next that of the next row's (1 after
the last row).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.config import DiffusionConfig, Prediction, SamplerConfig, Spacing, Variance
from ddpm_fast.constants import SAMPLER_COLUMN, Row
from ddpm_fast.diffusion.schedule import make_alpha_bar
from ddpm_fast.errors import require

PAPER = SamplerConfig()
"""Ho et al. 2020: ancestral sampling over all T steps."""


@dataclass(frozen=True)
class SamplerTable:
    """A sampler with K steps."""

    rows: Tensor
    """[K, 8] float64; the columns are those of `Row`."""
    clip: bool
    """Whether x0 is clipped to [-1, 1]."""

    @property
    def noisy(self) -> bool:
        """Whether any row adds noise."""
        return bool((self.rows[:, SAMPLER_COLUMN.noise] != 0).any())

    @property
    def multistep(self) -> bool:
        """Whether any row reads the last step's x0."""
        return bool((self.rows[:, SAMPLER_COLUMN.next_from_x0_prev] != 0).any())


def strided_timesteps(total: int, steps: int, spacing: Spacing) -> Tensor:
    """Choose `steps` of `total` timesteps, descending (the names follow Lin et al. 2024, Table 2).

    Returns:
        [K] int64, from high to low.

    Raises:
        InputError: steps lies outside 1..total.
    """
    require(1 <= steps <= total, f"--steps is {steps}: it must lie in 1..{total}, the timesteps of training")
    # NumPy's and PyTorch's round both go to the even neighbour, as the schedulers we are compared with do.
    descending = torch.arange(steps, dtype=torch.float64)
    if spacing == "trailing":
        return (total - descending * (total / steps)).round().long() - 1
    if spacing == "leading":
        return (torch.arange(steps) * (total // steps)).flip(0)
    return torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0)


def visited_timesteps(total: int, sampler: SamplerConfig) -> Tensor:
    """Choose the timesteps that a sampler visits: [K] int64, from high to low.

    DPM-Solver++ goes from one of K + 1 timesteps to the next (Lu et al. 2022, Algorithm 2), and its last step here on
    to clean data: of leading and linspace, which would end on t = 0, it visits all but that, as diffusers does.

    Raises:
        InputError: there are fewer timesteps than steps.
    """
    steps = sampler.steps or total
    if sampler.sampler == "dpm++" and sampler.spacing != "trailing" and steps < total:
        return strided_timesteps(total, steps + 1, sampler.spacing)[:-1]
    return strided_timesteps(total, steps, sampler.spacing)


def _next(alpha_bar: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha_bar at each row and at the row after it, which for the last row is clean data: 1."""
    alpha_bar = alpha_bar[t]
    return alpha_bar, torch.cat([alpha_bar[1:], torch.ones(1, dtype=alpha_bar.dtype)])


def _predict_x_start(alpha_bar: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Return x0_from_x and x0_from_prediction (eps: Ho et al. 2020, Eq. 15; v: Salimans and Ho 2022)."""
    if prediction == "eps":
        return alpha_bar.rsqrt(), ((1 - alpha_bar) / alpha_bar).sqrt()
    if prediction == "v":
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return torch.zeros_like(alpha_bar), -torch.ones_like(alpha_bar)


def _eps_direction(alpha_bar: Tensor, r: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Return next_from_x and next_from_prediction of r times the network's own eps, whatever it predicts."""
    zero = torch.zeros_like(r)
    if prediction == "eps":
        return zero, r
    if prediction == "v":
        return r * (1 - alpha_bar).sqrt(), r * alpha_bar.sqrt()
    return r / (1 - alpha_bar).sqrt(), -r * (alpha_bar / (1 - alpha_bar)).sqrt()


def ddpm_rows(alpha_bar: Tensor, t: Tensor, prediction: Prediction, variance: Variance) -> Row[Tensor]:
    """Return ancestral sampling's rows (Ho et al. 2020, Algorithm 2, Eq. 6 and 7); [K] each.

    For strided t, beta is that of the whole stride: 1 - alpha_bar / alpha_bar_next.
    """
    alpha_bar, alpha_bar_next = _next(alpha_bar, t)
    beta = 1 - alpha_bar / alpha_bar_next
    posterior_variance = beta * (1 - alpha_bar_next) / (1 - alpha_bar)
    noise = (posterior_variance if variance == "small" else beta).sqrt().clone()
    noise[-1] = 0  # none in the last step
    return Row(
        t.to(alpha_bar.dtype),
        *_predict_x_start(alpha_bar, prediction),
        next_from_x0=alpha_bar_next.sqrt() * beta / (1 - alpha_bar),
        next_from_x=(alpha_bar / alpha_bar_next).sqrt() * (1 - alpha_bar_next) / (1 - alpha_bar),
        next_from_prediction=torch.zeros_like(alpha_bar),
        next_from_x0_prev=torch.zeros_like(alpha_bar),
        noise=noise,
    )


def ddim_rows(alpha_bar: Tensor, t: Tensor, prediction: Prediction, eta: float = 0.0) -> Row[Tensor]:
    """Return DDIM's rows (Song et al. 2021, Eq. 12 and 16); [K] each."""
    alpha_bar, alpha_bar_next = _next(alpha_bar, t)
    noise = eta * ((1 - alpha_bar_next) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_next).sqrt()
    # Rounding may leave a tiny negative where eta = 1 and alpha_bar is close to alpha_bar_next.
    r = (1 - alpha_bar_next - noise**2).clamp(min=0).sqrt()
    next_from_x, next_from_prediction = _eps_direction(alpha_bar, r, prediction)
    return Row(
        t.to(alpha_bar.dtype),
        *_predict_x_start(alpha_bar, prediction),
        next_from_x0=alpha_bar_next.sqrt(),
        next_from_x=next_from_x,
        next_from_prediction=next_from_prediction,
        next_from_x0_prev=torch.zeros_like(alpha_bar),
        noise=noise,
    )


def dpm_solver_rows(alpha_bar: Tensor, t: Tensor, prediction: Prediction) -> Row[Tensor]:
    """Return DPM-Solver++(2M)'s rows (Lu et al. 2022, "DPM-Solver++", Algorithm 2); [K] each.

    With sigma = sqrt(1 - alpha_bar), lambda = log(sqrt(alpha_bar) / sigma), h the step in lambda, h_prev the last one:
    x = sigma_next/sigma * x - sqrt(alpha_bar_next) * (exp(-h) - 1) * D, D = (1 + 1/2r) x0 - 1/2r x0_prev, r = h_prev/h.
    The first row has no x0_prev, and the last, which ends on clean data, none that helps: both are of first order.
    """
    alpha_bar, alpha_bar_next = _next(alpha_bar, t)
    sigma, sigma_next = (1 - alpha_bar).sqrt(), (1 - alpha_bar_next).sqrt()
    log_snr = torch.cat([(alpha_bar.sqrt() / sigma).log(), torch.full((1,), torch.inf, dtype=alpha_bar.dtype)])
    h = log_snr.diff()
    gain = -alpha_bar_next.sqrt() * torch.expm1(-h)
    extrapolation = torch.zeros_like(alpha_bar)
    extrapolation[1:-1] = 0.5 * h[1:-1] / h[:-2]
    return Row(
        t.to(alpha_bar.dtype),
        *_predict_x_start(alpha_bar, prediction),
        next_from_x0=gain * (1 + extrapolation),
        next_from_x=sigma_next / sigma,
        next_from_prediction=torch.zeros_like(alpha_bar),
        next_from_x0_prev=-gain * extrapolation,
        noise=torch.zeros_like(alpha_bar),
    )


def sampler_table(diffusion: DiffusionConfig, sampler: SamplerConfig = PAPER) -> SamplerTable:
    """Return the table of a sampler for a trained process.

    Raises:
        InputError: more steps than timesteps, or an eta outside 0..1.
    """
    alpha_bar = make_alpha_bar(diffusion)
    require(0 <= sampler.eta <= 1, f"--eta is {sampler.eta}: it must lie in [0, 1]")
    t = visited_timesteps(diffusion.timesteps, sampler)
    if sampler.sampler == "ddpm":
        row = ddpm_rows(alpha_bar, t, diffusion.prediction, diffusion.variance)
    elif sampler.sampler == "ddim":
        row = ddim_rows(alpha_bar, t, diffusion.prediction, sampler.eta)
    elif sampler.sampler == "dpm++":
        row = dpm_solver_rows(alpha_bar, t, diffusion.prediction)
    else:
        raise NotImplementedError(f"--sampler {sampler.sampler} has no rows here")
    return SamplerTable(torch.stack(row, dim=1), diffusion.clip)
