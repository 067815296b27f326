"""Sampling data whose score is known in closed form: this catches what pictures hide.

The network is exact, so what a sampler returns must have the data's own mean and covariance, up to the error of taking
finitely many steps, which is computed without sampling, and up to the standard error of the samples taken.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ddpm_fast.config import DiffusionConfig, Prediction, SamplerConfig
from ddpm_fast.diffusion.noise import NoiseAddress, Stream, key_from_seed, normal
from ddpm_fast.diffusion.samplers import Row, SamplerTable, sampler_table
from ddpm_fast.diffusion.schedule import alphas_cumprod
from ddpm_fast.ops import reference

SHAPE, D = (1, 2, 2), 4
N = 20_000
SIGMAS = 5.0
PREDICTIONS: list[Prediction] = ["eps", "x0", "v"]
SAMPLERS = {
    "ddpm-small": (SamplerConfig("ddpm"), "small"),
    "ddpm-large": (SamplerConfig("ddpm"), "large"),
    "ddim-0": (SamplerConfig("ddim", eta=0.0), "small"),
    "ddim-1": (SamplerConfig("ddim", eta=1.0), "small"),
    "dpm++": (SamplerConfig("dpm++"), "small"),
}


def f64(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


class Gaussian(NamedTuple):
    """N(mean, covariance) over the four pixels."""

    mean: Tensor
    covariance: Tensor


def from_root(mean: list, root: list) -> Gaussian:
    return Gaussian(f64(mean), f64(root) @ f64(root).T)


DATA = from_root([0.3, -0.2, 0.1, 0.4], [[0.4, 0, 0, 0], [0.2, 0.3, 0, 0], [-0.1, 0.2, 0.3, 0], [0.3, -0.1, 0.1, 0.2]])
MIXTURE = [
    (0.3, from_root([-0.5, -0.4, -0.5, -0.3], [[0.1, 0, 0, 0], [0.05, 0.1, 0, 0], [0, 0, 0.1, 0], [0, 0, 0.06, 0.1]])),
    (0.7, from_root([0.4, 0.5, 0.3, 0.5], [[0.12, 0, 0, 0], [0, 0.1, 0, 0], [-0.06, 0, 0.1, 0], [0, 0.05, 0, 0.08]])),
]


def mixture_moments() -> Gaussian:
    mean = sum((weight * g.mean for weight, g in MIXTURE), torch.zeros(D))
    second = sum((w * (g.covariance + torch.outer(g.mean, g.mean)) for w, g in MIXTURE), torch.zeros(D, D))
    return Gaussian(mean, second - torch.outer(mean, mean))


def table_of(name: str, steps: int, prediction: Prediction = "eps", clip: bool = False) -> SamplerTable:
    sampler, variance = SAMPLERS[name]
    config = DiffusionConfig(prediction=prediction, variance=variance, clip=clip)  # pyright: ignore[reportArgumentType]
    return sampler_table(config, SamplerConfig(sampler.sampler, steps, sampler.eta))


def as_prediction(x: Tensor, eps: Tensor, ab: float, prediction: Prediction) -> Tensor:
    a, b = math.sqrt(ab), math.sqrt(1 - ab)
    x0 = (x - b * eps) / a
    return {"eps": eps, "x0": x0, "v": a * eps - b * x0}[prediction]


def gaussian_eps(x: Tensor, ab: float, data: Gaussian) -> Tensor:
    """-sqrt(1-ab) * score of N(a mean, a^2 covariance + b^2) at x [N, D]: the exact eps(x, t)."""
    spread = ab * data.covariance + (1 - ab) * torch.eye(D)
    return math.sqrt(1 - ab) * torch.linalg.solve(spread, (x - math.sqrt(ab) * data.mean).T).T


def mixture_eps(x: Tensor, ab: float) -> Tensor:
    """The components' eps, averaged by how likely each is to have made x."""
    logs, eps = [], []
    for weight, g in MIXTURE:
        spread = ab * g.covariance + (1 - ab) * torch.eye(D, dtype=torch.float64)
        density = torch.distributions.MultivariateNormal(math.sqrt(ab) * g.mean, spread)
        logs.append(density.log_prob(x) + math.log(weight))
        eps.append(gaussian_eps(x, ab, g))
    return (torch.softmax(torch.stack(logs), 0)[:, :, None] * torch.stack(eps)).sum(0)


def sample(table: SamplerTable, prediction: Prediction, data: Gaussian | None) -> Tensor:
    """Draw [N, D] samples by the reference op with addressable noise; `data` None is the mixture."""
    address, bar = NoiseAddress(key_from_seed(8), torch.arange(N)), alphas_cumprod(DiffusionConfig()).tolist()
    x = normal(address, 0, Stream.SAMPLING, SHAPE, torch.float64)
    x0 = torch.zeros_like(x)
    for k, t in enumerate(table.rows[:, 0].tolist()):
        flat, ab = x.flatten(1), bar[int(t)]
        eps = gaussian_eps(flat, ab, data) if data is not None else mixture_eps(flat, ab)
        out, step = as_prediction(flat, eps, ab, prediction).view_as(x), torch.tensor([k])
        reference.reverse_step(x, out, table.rows, step, *address, clip=table.clip, noisy=table.noisy, x0=x0)
    return x.flatten(1)


def exact_moments(table: SamplerTable, prediction: Prediction) -> Gaussian:
    """Push N(0, 1) through the table without sampling: with a Gaussian's eps every row is affine in (x, x0_prev)."""
    bar, one = alphas_cumprod(DiffusionConfig()).tolist(), torch.eye(D, dtype=torch.float64)
    mean, spread = torch.zeros(2 * D, dtype=torch.float64), torch.block_diag(one, torch.zeros_like(one))
    for values in table.rows.tolist():
        row = Row(*values)
        at = torch.cat([torch.zeros(1, D, dtype=torch.float64), one])  # the affine map, read off at 0 and the axes
        out = as_prediction(at, gaussian_eps(at, bar[int(row.t)], DATA), bar[int(row.t)], prediction)
        x0 = row.x0_from_x * at - row.x0_from_prediction * out
        x = row.next_from_x0 * x0 + row.next_from_x * at + row.next_from_prediction * out
        step = torch.cat(
            [
                torch.cat([(x[1:] - x[0]).T, row.next_from_x0_prev * one], 1),
                torch.cat([(x0[1:] - x0[0]).T, torch.zeros_like(one)], 1),
            ]
        )
        mean = step @ mean + torch.cat([x[0], x0[0]])
        spread = step @ spread @ step.T + row.noise**2 * torch.block_diag(one, torch.zeros_like(one))
    return Gaussian(mean[:D], spread[:D, :D])


def error(found: Gaussian, truth: Gaussian) -> float:
    """The largest error of any mean or covariance."""
    return max(float((f - t).abs().max()) for f, t in zip(found, truth, strict=True))


def assert_recovered(samples: Tensor, truth: Gaussian, bias: float) -> None:
    """Mean and covariance within five standard errors, plus the known error of finitely many steps."""
    variance = truth.covariance.diagonal()
    mean_se = (variance / N).sqrt()
    # A Gaussian's standard error; that of these mixtures, flatter than a Gaussian, is smaller.
    covariance_se = ((torch.outer(variance, variance) + truth.covariance**2) / N).sqrt()
    assert ((samples.mean(0) - truth.mean).abs() <= SIGMAS * mean_se + bias).all()
    assert ((samples.T.cov() - truth.covariance).abs() <= SIGMAS * covariance_se + bias).all()


# The largest error of a mean or a covariance (variances 0.13 to 0.16) after all 1000 steps, computed once and rounded
# up: first-order samplers lose half of it with every doubling of K; DPM-Solver++ is left with what the last row, the
# posterior mean at t = 0, shrinks.
BIAS_1000 = {"ddpm-small": 2.8e-3, "ddpm-large": 6.5e-4, "ddim-0": 1.2e-3, "ddim-1": 2.8e-3, "dpm++": 1.2e-3}
BIAS_50 = {"ddpm-small": 3.5e-2, "ddpm-large": 9.5e-3, "ddim-0": 2.0e-2, "ddim-1": 3.5e-2, "dpm++": 2.3e-3}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_all_steps_leave_a_gaussian_its_moments(name, prediction):
    assert error(exact_moments(table_of(name, 1000, prediction), prediction), DATA) < BIAS_1000[name]


@pytest.mark.parametrize("name", SAMPLERS)
def test_error_falls_with_the_order_of_the_sampler(name):
    few, many = (25, 50) if name == "dpm++" else (200, 400)
    ratio = error(exact_moments(table_of(name, few), "eps"), DATA) / error(
        exact_moments(table_of(name, many), "eps"), DATA
    )
    assert ratio > 4 if name == "dpm++" else 1.7 < ratio < 2.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_a_gaussian_have_its_moments(name):
    samples = sample(table_of(name, 50), "eps", DATA)
    assert_recovered(samples, exact_moments(table_of(name, 50), "eps"), 0.0)
    assert_recovered(samples, DATA, BIAS_50[name])


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_predictions_of_x0_and_v_draw_the_samples_of_eps(prediction):
    few = [sample(table_of("ddpm-small", 10, p), p, DATA) for p in ("eps", prediction)]
    torch.testing.assert_close(few[1], few[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_a_mixture_have_its_moments_and_shares(name):
    samples = sample(table_of(name, 50, clip=True), "eps", None)
    # A mixture lies in two clusters of narrow spread: half of a Gaussian's error of the same steps, and less.
    assert_recovered(samples, mixture_moments(), BIAS_50[name] / 2)
    share = (samples.sum(1) < 0).double().mean().item()
    assert abs(share - 0.3) < SIGMAS * math.sqrt(0.3 * 0.7 / N)
