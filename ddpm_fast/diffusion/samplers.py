"""Samplers as tables: DDPM, DDIM and DPM-Solver++(2M) differ only in the numbers of K rows.

One reverse step, whatever the sampler (columns of a row in the order of `Row`):

    x0 = p*x - q*out                  (then clipped to [-1, 1] if asked)
    x  = u*x0 + v*x + e*out + w*x0_prev + s*z

x is x_t, out what the U-Net returned, x0_prev the last step's x0, z fresh noise, t what the U-Net is told.
All rows are computed in float64. ab is alphas_cumprod at this row's t, ab_next at the next row's (1 after the
last row).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.config import DiffusionConfig, Prediction, SamplerConfig, Spacing, Variance
from ddpm_fast.diffusion.schedule import alphas_cumprod

PAPER = SamplerConfig()
"""Ho et al. 2020: ancestral sampling over all T steps."""


class Row(NamedTuple):
    """Columns of a sampler's table."""

    t: Tensor
    p: Tensor
    q: Tensor
    u: Tensor
    v: Tensor
    e: Tensor
    w: Tensor
    s: Tensor


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
        return bool((self.rows[:, Row._fields.index("s")] != 0).any())

    @property
    def multistep(self) -> bool:
        """Whether any row reads the last step's x0."""
        return bool((self.rows[:, Row._fields.index("w")] != 0).any())


def strided_timesteps(total: int, steps: int, spacing: Spacing) -> Tensor:
    """Choose `steps` of `total` timesteps, descending (the names follow Lin et al. 2024, Table 2).

    Returns:
        [K] int64, from high to low.

    Raises:
        ValueError: steps lies outside 1..total.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} sampling steps: there must be 1 to {total}")
    # NumPy's and PyTorch's round both go to the even neighbour, as the schedulers we are compared with do.
    descending = torch.arange(steps, dtype=torch.float64)
    if spacing == "trailing":
        return (total - descending * (total / steps)).round().long() - 1
    if spacing == "leading":
        return (torch.arange(steps) * (total // steps)).flip(0)
    return torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0)


def _next(alpha_bar: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return ab at each row and at the row after it, which for the last row is clean data: 1."""
    ab = alpha_bar[t]
    return ab, torch.cat([ab[1:], torch.ones(1, dtype=ab.dtype)])


def _predict_x_start(ab: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Return p and q of x0 = p*x - q*out (eps: Ho et al. 2020, Eq. 15; v: Salimans and Ho 2022)."""
    if prediction == "eps":
        return ab.rsqrt(), ((1 - ab) / ab).sqrt()
    if prediction == "v":
        return ab.sqrt(), (1 - ab).sqrt()
    return torch.zeros_like(ab), -torch.ones_like(ab)


def _eps_direction(ab: Tensor, r: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Return what r * eps adds to v and e: r times the network's own eps, whatever it predicts."""
    zero = torch.zeros_like(r)
    if prediction == "eps":
        return zero, r
    if prediction == "v":
        return r * (1 - ab).sqrt(), r * ab.sqrt()
    return r / (1 - ab).sqrt(), -r * (ab / (1 - ab)).sqrt()


def ddpm_rows(alpha_bar: Tensor, t: Tensor, prediction: Prediction, variance: Variance) -> Row:
    """Return ancestral sampling's rows (Ho et al. 2020, Algorithm 2, Eq. 6 and 7); [K] each.

    For strided t, beta is that of the whole stride: 1 - ab / ab_next.
    """
    ab, ab_next = _next(alpha_bar, t)
    p, q = _predict_x_start(ab, prediction)
    beta = 1 - ab / ab_next
    u = ab_next.sqrt() * beta / (1 - ab)
    v = (ab / ab_next).sqrt() * (1 - ab_next) / (1 - ab)
    posterior_variance = beta * (1 - ab_next) / (1 - ab)
    s = (posterior_variance if variance == "small" else beta).sqrt().clone()
    s[-1] = 0  # no noise in the last step
    zero = torch.zeros_like(ab)
    return Row(t.to(ab.dtype), p, q, u, v, zero, zero, s)


def ddim_rows(alpha_bar: Tensor, t: Tensor, prediction: Prediction, eta: float = 0.0) -> Row:
    """Return DDIM's rows (Song et al. 2021, Eq. 12 and 16); [K] each."""
    ab, ab_next = _next(alpha_bar, t)
    p, q = _predict_x_start(ab, prediction)
    s = eta * ((1 - ab_next) / (1 - ab)).sqrt() * (1 - ab / ab_next).sqrt()
    # Rounding may leave a tiny negative where eta = 1 and ab is close to ab_next.
    r = (1 - ab_next - s**2).clamp(min=0).sqrt()
    v, e = _eps_direction(ab, r, prediction)
    return Row(t.to(ab.dtype), p, q, ab_next.sqrt(), v, e, torch.zeros_like(ab), s)


def dpm_solver_rows(alpha_bar: Tensor, t: Tensor, prediction: Prediction) -> Row:
    """Return DPM-Solver++(2M)'s rows (Lu et al. 2022, "DPM-Solver++", Algorithm 2); [K] each.

    With sigma = sqrt(1 - ab), lambda = log(sqrt(ab) / sigma), h the step in lambda and h_prev the one before:
    x = sigma_next/sigma * x - sqrt(ab_next) * (exp(-h) - 1) * D, D = (1 + 1/2r) x0 - 1/2r x0_prev, r = h_prev/h.
    The first row has no x0_prev, and the last, which ends on clean data, none that helps: both are of first order.
    """
    ab, ab_next = _next(alpha_bar, t)
    p, q = _predict_x_start(ab, prediction)
    sigma, sigma_next = (1 - ab).sqrt(), (1 - ab_next).sqrt()
    log_snr = torch.cat([(ab.sqrt() / sigma).log(), torch.full((1,), torch.inf, dtype=ab.dtype)])
    h = log_snr.diff()
    gain = -ab_next.sqrt() * torch.expm1(-h)
    extrapolation = torch.zeros_like(ab)
    extrapolation[1:-1] = 0.5 * h[1:-1] / h[:-2]
    zero = torch.zeros_like(ab)
    u, w = gain * (1 + extrapolation), -gain * extrapolation
    return Row(t.to(ab.dtype), p, q, u, sigma_next / sigma, zero, w, zero)


def sampler_table(diffusion: DiffusionConfig, sampler: SamplerConfig = PAPER) -> SamplerTable:
    """Return the table of a sampler for a trained process.

    Raises:
        ValueError: more steps than timesteps, or an eta outside 0..1.
    """
    alpha_bar = alphas_cumprod(diffusion)
    total, steps = diffusion.timesteps, sampler.steps or diffusion.timesteps
    if not 0 <= sampler.eta <= 1:
        raise ValueError(f"eta is {sampler.eta}: it must lie in [0, 1]")
    t = strided_timesteps(total, steps, sampler.spacing)
    if sampler.sampler == "ddpm":
        row = ddpm_rows(alpha_bar, t, diffusion.prediction, diffusion.variance)
    elif sampler.sampler == "ddim":
        row = ddim_rows(alpha_bar, t, diffusion.prediction, sampler.eta)
    else:
        row = dpm_solver_rows(alpha_bar, t, diffusion.prediction)
    return SamplerTable(torch.stack(row, dim=1), diffusion.clip)
