"""Checks of the process that need no network: noise, schedule and samplers (see `mathematics`)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.config import DiffusionConfig, SamplerConfig
from ddpm_fast.constants import SAMPLER_COLUMN, Row, TrainingTable
from ddpm_fast.diffusion import schedule
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.diffusion.samplers import SamplerTable, sampler_table
from ddpm_fast.ops import REFERENCE, Ops

SIGMAS = 5.0
"""Standard errors that a statistic may be off: 1 false alarm in 1.7 million."""


@dataclass(frozen=True)
class CheckResult:
    """One thing that was checked."""

    name: str
    passed: bool
    expected: str
    found: str
    file: str


def _zeros(sample_index: Tensor, shape: tuple[int, int, int]) -> Tensor:
    zeros = torch.zeros(len(sample_index), *shape, device=sample_index.device)
    return zeros.contiguous(memory_format=torch.channels_last)


def training_noise(sample_index: Tensor, shape: tuple[int, int, int], seed: int, ops: Ops) -> Tensor:
    """Return the noise that q_sample really adds: by a table of one row that keeps nothing of the images."""
    device = sample_index.device
    row = TrainingTable(signal=0.0, noise=1.0, target_eps=1.0, target_x_start=0.0, weight=1.0)
    t, key = torch.zeros_like(sample_index), key_from_seed(seed, device)
    return ops.q_sample(_zeros(sample_index, shape), t, torch.tensor([row], device=device), key, sample_index)


def _sampling_noise(sample_index: Tensor, shape: tuple[int, int, int], step: int, ops: Ops) -> Tensor:
    """Return the noise that reverse_step really adds: by rows of noise and nothing else."""
    device = sample_index.device
    x = _zeros(sample_index, shape)
    rows = torch.zeros(step + 1, len(SAMPLER_COLUMN), device=device)
    rows[:, SAMPLER_COLUMN.noise] = 1
    at = torch.full((1,), step, dtype=torch.int64, device=device)
    ops.reverse_step(x, x.clone(), rows, at, key_from_seed(0, device), sample_index, clip=False, noisy=True)
    return x


def kolmogorov_smirnov(z: Tensor) -> float:
    """Return sqrt(n) times the largest distance between z's distribution and N(0, 1); above 2.2 once in 10,000."""
    ordered = z.double().flatten().sort().values
    n = len(ordered)
    expected = torch.special.ndtr(ordered)
    ranks = torch.arange(n + 1, dtype=torch.float64, device=z.device) / n
    distance = torch.maximum((ranks[1:] - expected).max(), (expected - ranks[:-1]).max())
    return float(distance) * n**0.5


def _correlation_sigmas(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two equally shaped noises, in standard errors."""
    a, b = a.double().flatten(), b.double().flatten()
    return abs(float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())) * len(a) ** 0.5


def check_noise(shape: tuple[int, int, int], device: torch.device, ops: Ops = REFERENCE) -> Iterator[CheckResult]:
    """Check that noise is N(0, 1) and independent over pixels, channels, samples and steps."""
    _, height, width = shape
    count = max(2, min(4096, 65536 // (height * width)))
    sample_index = torch.arange(count, device=device)
    wide = (4, height, width)  # the most channels that images have
    file = "ddpm_fast/diffusion/noise.py"
    for name, noise in (("training", training_noise), ("sampling", _sampling_noise)):
        z, other = (noise(sample_index, wide, number, ops) for number in range(2))  # of two seeds, or two steps
        n = z.numel()
        mean, variance = float(z.mean()) * n**0.5, (float(z.square().mean()) - 1) * (n / 2) ** 0.5
        distance = kolmogorov_smirnov(z)
        normal = abs(mean) < SIGMAS and abs(variance) < SIGMAS and distance < 2.2
        found = f"mean {mean:+.1f} and variance {variance:+.1f} standard errors off, Kolmogorov-Smirnov {distance:.2f}"
        yield CheckResult(f"{name} noise is N(0, 1)", normal, f"within {SIGMAS:.0f}, below 2.2", found, file)
        neighbours = {
            "channels": (z[:, 1:], z[:, :-1]),
            "samples": (z[1:], z[:-1]),
            "seeds" if name == "training" else "steps": (z, other),
        }
        if height > 1:
            neighbours["rows"] = (z[:, :, 1:], z[:, :, :-1])
        if width > 1:
            neighbours["columns"] = (z[..., 1:], z[..., :-1])
        worst, off = max(((k, _correlation_sigmas(*v)) for k, v in neighbours.items()), key=lambda kv: kv[1])
        found = f"between {worst} {off:.1f} standard errors"
        yield CheckResult(
            f"{name} noise is independent", off < SIGMAS, f"correlations within {SIGMAS:.0f}", found, file
        )


def check_schedule(diffusion: DiffusionConfig) -> Iterator[CheckResult]:
    """Check that the schedule falls monotonically and ends in noise, and that variance is preserved."""
    file = "ddpm_fast/diffusion/schedule.py"
    betas, alpha_bar = schedule.betas(diffusion), schedule.make_alpha_bar(diffusion)
    monotone = bool((betas > 0).all() and (betas < 1).all() and (alpha_bar.diff() < 0).all())
    found = f"betas {float(betas.min()):.2g}..{float(betas.max()):.2g}"
    yield CheckResult("the schedule is monotone", monotone, "0 < beta < 1 and alpha_bar falling", found, file)
    last = float(alpha_bar[-1])
    yield CheckResult(
        "the schedule ends in noise", last < 0.01, "alpha_bar[T-1] below 0.01", f"{last:.2g}", f"{file}, or betas"
    )
    # Products of 1 - beta by another way: sums of logarithms.
    expected = torch.exp(torch.cumsum(torch.log1p(-betas), 0))
    table = TrainingTable(*schedule.training_table(diffusion).double().unbind(1))
    off = float((table.signal**2 - expected).abs().max())
    name, wanted = "signal is sqrt(alpha_bar)", "signal**2 = prod(1 - beta) within 1e-6"
    yield CheckResult(name, off < 1e-6, wanted, f"{off:.1e} off", file)
    off = float((table.signal**2 + table.noise**2 - 1).abs().max())
    wanted = "signal**2 + noise**2 = 1 within 1e-6"
    yield CheckResult("Var[x_t] = 1 at every t", off < 1e-6, wanted, f"{off:.1e} off", file)


def closed_form_target(diffusion: DiffusionConfig, t: Tensor, x_start: Tensor, eps: Tensor) -> Tensor:
    """Return what the network should predict, from alpha_bar alone."""
    alpha_bar = schedule.make_alpha_bar(diffusion).to(x_start.device)[t].view(-1, 1, 1, 1)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_start
    return {"eps": eps, "x0": x_start, "v": v}[diffusion.prediction].float()


def _check_posterior(diffusion: DiffusionConfig, file: str) -> Iterator[CheckResult]:
    row = Row(*sampler_table(diffusion).rows.flip(0).unbind(1))  # row t now belongs to t
    betas = schedule.betas(diffusion)[1:]
    prior_variance = 1 - schedule.make_alpha_bar(diffusion)[:-1]
    # q(x_{t-1} | x_0) times q(x_t | x_{t-1}), both Gaussian: precisions add up.
    variance = 1 / (1 / prior_variance + (1 - betas) / betas)
    from_x0 = variance * (1 - prior_variance).sqrt() / prior_variance
    from_x = variance * (1 - betas).sqrt() / betas
    off = float(torch.maximum((row.next_from_x0[1:] - from_x0).abs(), (row.next_from_x[1:] - from_x).abs()).max())
    yield CheckResult("the posterior mean is Bayes' rule", off < 1e-9, "within 1e-9", f"{off:.1e} off", file)
    expected = variance if diffusion.variance == "small" else betas
    off = float((row.noise[1:] ** 2 / expected - 1).abs().max()) + float(row.noise[0].abs())
    name = f"the posterior variance is the fixed {diffusion.variance} one"
    yield CheckResult(name, off < 1e-9, "within 1e-9 of it, none in the last step", f"{off:.1e} off", file)


def check_samplers(diffusion: DiffusionConfig, device: torch.device, ops: Ops = REFERENCE) -> Iterator[CheckResult]:
    """Check the posterior by Bayes' rule computed another way, and every sampler with the true prediction."""
    file = "ddpm_fast/diffusion/samplers.py"
    yield from _check_posterior(diffusion, file) if diffusion.timesteps > 1 else ()
    steps = min(20, diffusion.timesteps)
    for config in (SamplerConfig("ddpm", steps), SamplerConfig("ddim", steps), SamplerConfig("dpm++", steps)):
        off = _distance_with_true_prediction(diffusion, sampler_table(diffusion, config), device, ops)
        name = f"{config.sampler} with the true prediction ends on the data"
        yield CheckResult(name, off < 1e-3, "within 1e-3", f"{off:.1e} off", f"{file} or ddpm_fast/ops/reference.py")


def _distance_with_true_prediction(
    diffusion: DiffusionConfig, table: SamplerTable, device: torch.device, ops: Ops
) -> float:
    """Run a sampler whose network knows the answer; return how far from it the sampler ends."""
    generator = torch.Generator().manual_seed(0)
    x_start, x = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1, torch.randn(2, 3, 4, 4, generator=generator)
    x_start, x = (value.to(device).contiguous(memory_format=torch.channels_last) for value in (x_start, x))
    x0 = torch.zeros_like(x)
    sample_index, key = torch.arange(2, device=device), key_from_seed(0, device)
    rows = table.rows.to(device, torch.float32)
    for k in range(len(rows)):
        t = rows[k, SAMPLER_COLUMN.t].long().expand(2)
        alpha_bar = schedule.make_alpha_bar(diffusion).to(device)[t].view(-1, 1, 1, 1)
        eps = (x.double() - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
        prediction = closed_form_target(diffusion, t, x_start.double(), eps)
        step = torch.full((1,), k, dtype=torch.int64, device=device)
        options = {"clip": table.clip, "noisy": table.noisy}
        ops.reverse_step(x, prediction, rows, step, key, sample_index, x0=x0, **options)
    return float((x - x_start).abs().max())
