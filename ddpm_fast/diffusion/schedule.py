"""The forward process: betas, what follows from them, and the table that training reads.

The code's t = 0..T-1 is the paper's t - 1: alpha_bar[t] is the paper's alpha-bar of t + 1.
Everything is computed in float64; only the finished training table is float32.
"""

import math

import torch
from torch import Tensor

from ddpm_fast.config import DiffusionConfig, Prediction, TimestepDensity
from ddpm_fast.constants import TrainingTable

LAPLACE_CENTRE, LAPLACE_SCALE = 0.5, 1.0
"""Of the log SNR at which laplace trains. Chosen by the quality of digits: see profiles/speedrun.md."""
UNIFORM_SHARE = 0.15
"""Of laplace's draws, so that the ends, where sampling begins and stops, are trained too."""


def linear_betas(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Return the paper's schedule (Ho et al. 2020, Section 4): [T] float64."""
    return torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)


def _betas_from(alpha_bar: Tensor, largest: float = 0.999) -> Tensor:
    """Return the betas whose products are alpha_bar[1:] / alpha_bar[0], clipped at `largest`."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest)


def cosine_betas(timesteps: int, offset: float = 0.008) -> Tensor:
    """Return the cosine schedule (Nichol and Dhariwal 2021, Eq. 17): [T] float64."""
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    return _betas_from(torch.cos((u + offset) / (1 + offset) * (math.pi / 2)) ** 2)


def sigmoid_betas(timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """Return the sigmoid schedule (Jabri et al. 2022; Chen 2023, Section 2): [T] float64."""
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    first, last = (torch.tensor(x / tau, dtype=torch.float64).sigmoid() for x in (start, end))
    return _betas_from((last - ((u * (end - start) + start) / tau).sigmoid()) / (last - first))


def betas(config: DiffusionConfig) -> Tensor:
    """Return the configured schedule's betas: [T] float64."""
    if config.schedule == "linear":
        return linear_betas(config.timesteps, config.beta_start, config.beta_end)
    return {"cosine": cosine_betas, "sigmoid": sigmoid_betas}[config.schedule](config.timesteps)


def make_alpha_bar(config: DiffusionConfig) -> Tensor:
    """Return alpha-bar, the share of the data's variance left at t (Ho et al. 2020, Eq. 4): [T] float64."""
    return torch.cumprod(1 - betas(config), dim=0)


def loss_weights(alpha_bar: Tensor, prediction: Prediction, min_snr_gamma: float) -> Tensor:
    """Return the weight of each t's squared error: ones, or min-SNR (Hang et al. 2023, Section 3.4).

    Args:
        alpha_bar: [T] float64.
        prediction: what the U-Net predicts; the same weighting of x0's error takes another form for each.
        min_snr_gamma: the clamp; 0 for ones.

    Returns:
        [T] float64.
    """
    if min_snr_gamma == 0:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    clamped = snr.clamp(max=min_snr_gamma)
    return {"x0": clamped, "eps": clamped / snr, "v": clamped / (snr + 1)}[prediction]


def timestep_shares(config: DiffusionConfig, density: TimestepDensity) -> Tensor:
    """Return how often each t is drawn in training: [T] float64, whose sum is 1.

    laplace is a Laplace distribution of log SNR (Hang et al. 2025, arXiv 2407.03297, Table 1) by the step of log SNR
    from one t to the next, mixed with a uniform share. Sampling visits the same timesteps whatever it is.
    """
    uniform = torch.full((config.timesteps,), 1 / config.timesteps, dtype=torch.float64)
    if density == "uniform" or config.timesteps == 1:
        return uniform
    log_snr = make_alpha_bar(config).logit()
    laplace = torch.exp(-(log_snr - LAPLACE_CENTRE).abs() / LAPLACE_SCALE) * torch.gradient(log_snr)[0].abs()
    return UNIFORM_SHARE * uniform + (1 - UNIFORM_SHARE) * laplace / laplace.sum()


def timestep_thresholds(config: DiffusionConfig, density: TimestepDensity) -> Tensor | None:
    """Return where t steps up by one, in random words from 0 to 2**32 - 1: [T - 1] int64; None where it is uniform."""
    if density == "uniform":
        return None
    return (timestep_shares(config, density).cumsum(0)[:-1] * 2**32).round().long()


def training_table(config: DiffusionConfig, min_snr_gamma: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the training table (Ho et al. 2020, Eq. 4 and 14; v as in Salimans and Ho 2022, Appendix D).

    Returns:
        [T, 5] in `dtype`; the columns are those of `TrainingTable`.
    """
    alpha_bar = make_alpha_bar(config)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    target = {"eps": (one, zero), "x0": (zero, one), "v": (signal, -noise)}[config.prediction]
    columns = TrainingTable(signal, noise, *target, loss_weights(alpha_bar, config.prediction, min_snr_gamma))
    return torch.stack(columns, dim=1).to(dtype)
