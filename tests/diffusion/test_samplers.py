"""Samplers' tables against closed forms, diffusers' schedulers, and data whose score is known."""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast.config import DiffusionConfig, SamplerConfig
from ddpm_fast.diffusion import samplers
from ddpm_fast.diffusion.noise import NoiseAddress, Stream, key_from_seed, normal
from ddpm_fast.diffusion.samplers import Row, SamplerTable
from ddpm_fast.diffusion.schedule import make_alpha_bar
from ddpm_fast.ops import reference

PREDICTIONS = ["eps", "x0", "v"]
SPACINGS = ["trailing", "leading", "linspace"]
STEPS = [1, 2, 3, 10, 50, 1000]
EACH = list(itertools.product(PREDICTIONS, STEPS))
THEIRS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (1, 2, 3)
ADDRESS = NoiseAddress(key_from_seed(5), torch.arange(2))


def diffusers(scheduler: str) -> Any:
    """Return one of diffusers' modules, or skip the test where diffusers is not installed."""
    return pytest.importorskip(f"diffusers.schedulers.scheduling_{scheduler}")


class Trajectory(NamedTuple):
    """x after every step, and the largest of |x| and |x0| seen: the scale that rounding is measured in."""

    x: list[Tensor]
    scale: float


def network(x: Tensor, t: int) -> Tensor:
    """Stand in for a U-Net: any fixed smooth function of x_t and t."""
    place = torch.arange(x.numel(), dtype=x.dtype).view(x.shape)
    return 0.6 * torch.tanh(x) + torch.sin(place + t / 100)


@functools.cache
def noise_of(step: int) -> Tensor:
    return normal(ADDRESS, step, Stream.SAMPLING, SHAPE, torch.float64)


def x_last() -> Tensor:
    return noise_of(0).clone()


def walk(table: SamplerTable) -> Trajectory:
    """Run a table by the reference op in float64."""
    x, x0, xs, scale = x_last(), torch.zeros(2, *SHAPE, dtype=torch.float64), [], 1.0
    options = {"x0": x0, "clip": table.clip, "noisy": table.noisy}
    for k, t in enumerate(table.rows[:, 0].tolist()):
        reference.reverse_step(x, network(x, round(t)), table.rows, torch.tensor([k]), *ADDRESS, **options)
        xs.append(x.clone())
        scale = max(scale, x.abs().max().item(), x0.abs().max().item())
    return Trajectory(xs, scale)


def table_of(diffusion: DiffusionConfig, sampler: SamplerConfig) -> SamplerTable:
    return samplers.sampler_table(diffusion, sampler)


def test_a_table_is_k_rows_of_eight_finite_numbers():
    for name, steps in itertools.product(("ddpm", "ddim", "dpm++"), STEPS):
        table = table_of(DiffusionConfig(), SamplerConfig(name, steps))  # pyright: ignore[reportArgumentType]
        assert table.rows.shape == (steps, len(Row._fields))
        assert table.rows.isfinite().all()
        assert table.noisy == (name == "ddpm" and steps > 1)
        assert table.multistep == (name == "dpm++" and steps > 2)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_distinct_descending_and_all_of_them_at_k_equal_t(spacing):
    for steps in range(1, 101):
        t = samplers.strided_timesteps(100, steps, spacing)
        assert t.shape == (steps,)
        assert (t.diff() < 0).all()
        assert t[-1] >= 0
        assert t[0] <= 99
    assert samplers.strided_timesteps(100, 100, spacing).tolist() == list(range(99, -1, -1))
    for steps in (0, 101):
        with pytest.raises(ValueError, match=r"it must lie in 1\.\.100"):
            samplers.strided_timesteps(100, steps, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_diffusers(spacing):
    scheduler = diffusers("ddpm").DDPMScheduler(1000, timestep_spacing=spacing)
    for steps in (1, 2, 3, 7, 10, 50, 64, 333, 999, 1000):
        scheduler.set_timesteps(steps)
        assert samplers.strided_timesteps(1000, steps, spacing).tolist() == scheduler.timesteps[:steps].tolist()


def test_no_spacing_but_trailing_is_told_t_0_alone_in_one_step():
    assert samplers.strided_timesteps(1000, 1, "trailing").tolist() == [999]
    assert samplers.strided_timesteps(1000, 1, "leading").tolist() == [0]


@pytest.mark.parametrize(("prediction", "steps"), EACH)
def test_x0_is_recovered_exactly_from_the_true_prediction(prediction, steps):
    row = Row(*table_of(DiffusionConfig(prediction=prediction), SamplerConfig(steps=steps)).rows.T)
    alpha_bar = make_alpha_bar(DiffusionConfig())[row.t.long()]
    x_start, eps = 0.3, -1.7
    x = alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * eps
    out = {"eps": eps, "x0": x_start, "v": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_start}[prediction]
    assert ((row.x0_from_x * x - row.x0_from_prediction * out - x_start) * alpha_bar.sqrt()).abs().max() < 1e-14


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(("schedule", "steps"), list(itertools.product(["linear", "cosine", "sigmoid"], STEPS)))
def test_ddpm_is_bayes_rule(schedule, steps, variance):
    """The posterior of x_t' given x_0 and x_t, as a product of two Gaussians' precisions."""
    config = DiffusionConfig(schedule=schedule, variance=variance)
    row = Row(*table_of(config, SamplerConfig(steps=steps)).rows.T.numpy())
    alpha_bar = make_alpha_bar(config).numpy()[row.t.astype(int)]
    alpha, alpha_bar_next = alpha_bar[:-1] / alpha_bar[1:], alpha_bar[1:]
    prior, likelihood = 1 / (1 - alpha_bar_next), alpha / (1 - alpha)
    spread = 1 / (prior + likelihood)
    # 1 - alpha_bar loses 1e-16 / 1e-4 of itself at t = 0; sqrt(1 - beta) 1e-16 / 1e-4 where alpha_bar ends at 1e-9.
    np.testing.assert_allclose(row.next_from_x0, [*(spread * prior * np.sqrt(alpha_bar_next)), 1], rtol=1e-10)
    np.testing.assert_allclose(row.next_from_x, [*(spread * likelihood / np.sqrt(alpha)), 0], rtol=1e-10, atol=1e-12)
    s = np.sqrt(spread if variance == "small" else 1 - alpha)
    np.testing.assert_allclose(row.noise, [*s, 0], rtol=1e-10)
    assert not row.next_from_prediction.any()
    assert not row.next_from_x0_prev.any()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("prediction", "steps"), EACH)
def test_ddim_is_equation_12(prediction, steps, eta):
    row = Row(*table_of(DiffusionConfig(prediction=prediction), SamplerConfig("ddim", steps, eta)).rows.T)
    alpha_bar = make_alpha_bar(DiffusionConfig())[row.t.long()]
    alpha_bar_next = torch.tensor([*alpha_bar[1:].tolist(), 1.0], dtype=torch.float64)
    sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()
    x, out, x0 = 0.7, -0.4, 0.25  # x0 is independent of x and out, as it is when it has been clipped
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    eps = {"eps": out + 0 * a, "x0": (x - a * out) / b, "v": a * out + b * x}[prediction]
    expected = alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next - sigma**2).clamp(min=0).sqrt() * eps
    found = row.next_from_x0 * x0 + row.next_from_x * x + row.next_from_prediction * out
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(row.noise, sigma, rtol=1e-10, atol=0)
    assert not row.next_from_x0_prev.any()
    assert row.noise[-1] == 0


@pytest.mark.parametrize(("prediction", "steps"), EACH)
def test_ddim_at_eta_one_is_ddpm_with_the_small_variance(prediction, steps):
    config = DiffusionConfig(prediction=prediction, variance="small")
    ddim = Row(*table_of(config, SamplerConfig("ddim", steps, eta=1.0)).rows.T)
    ddpm = Row(*table_of(config, SamplerConfig("ddpm", steps)).rows.T)
    for gain in (
        lambda r: r.next_from_x0 * r.x0_from_x + r.next_from_x,
        lambda r: r.next_from_prediction - r.next_from_x0 * r.x0_from_prediction,
        lambda r: r.noise,
    ):
        torch.testing.assert_close(gain(ddim), gain(ddpm), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_is_algorithm_2(steps):
    row = Row(*table_of(DiffusionConfig(), SamplerConfig("dpm++", steps)).rows.T)
    alpha_bar = [float(v) for v in make_alpha_bar(DiffusionConfig())[row.t.long()]]
    lam = [0.5 * np.log(v / (1 - v)) for v in alpha_bar]
    for i in range(steps - 1):
        h, sigma_ratio = lam[i + 1] - lam[i], np.sqrt((1 - alpha_bar[i + 1]) / (1 - alpha_bar[i]))
        gain = -np.sqrt(alpha_bar[i + 1]) * (np.exp(-h) - 1)
        extra = 0.0 if i == 0 else 1 / (2 * (lam[i] - lam[i - 1]) / h)
        found = [column[i].item() for column in (row.next_from_x0, row.next_from_x, row.next_from_x0_prev)]
        assert found == pytest.approx([gain * (1 + extra), sigma_ratio, -gain * extra], rel=1e-8)
    assert [column[-1].item() for column in (row.next_from_x0, row.next_from_x, row.next_from_x0_prev)] == [1, 0, 0]
    assert not row.next_from_prediction.any()
    assert not row.noise.any()


# ---- diffusers' schedulers over whole trajectories ------------------------------------------------------------------


def walk_ddpm(scheduler: Any, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    module, x, xs = diffusers("ddpm"), x_last(), []
    for k, t in enumerate(scheduler.timesteps[:steps].tolist()):
        # Ours adds no noise in the last step, theirs only where t is 0; and theirs is N(0, beta) there if "large".
        z = noise_of(k + 1) * (k < steps - 1)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, z=z, **__: z)
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        xs.append(x)
    return xs


def walk_ddim(scheduler: Any, eta: float, steps: int) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    x, xs = x_last(), []
    for k, t in enumerate(scheduler.timesteps[:steps].tolist()):
        z = noise_of(k + 1) if eta else None
        x = scheduler.step(network(x, t), t, x, eta=eta, variance_noise=z, return_dict=False)[0]
        xs.append(x)
    return xs


def assert_same(ours: Trajectory, theirs: list[Tensor], bound: float) -> None:
    assert len(ours.x) == len(theirs)
    for k, (x, y) in enumerate(zip(ours.x, theirs, strict=True)):
        assert (x - y).abs().max() <= bound * ours.scale, f"step {k}"


def exact(scheduler: Any, schedule: str, total: int) -> Any:
    """Give a scheduler our float64 alpha_bar: what is left to compare is its algorithm, to float64 rounding."""
    scheduler.alphas_cumprod = make_alpha_bar(DiffusionConfig(timesteps=total, schedule=schedule))  # pyright: ignore[reportArgumentType]
    return scheduler


CASES = [case for case in itertools.product(STEPS, SPACINGS) if case[0] < 1000 or case[1] == "trailing"]
CLOSE = 1e-9  # float64 rounding over 1000 steps, times the 157 by which the linear schedule magnifies x


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(("steps", "spacing"), CASES)
def test_ddpm_is_diffusers(steps, spacing, variance, clip, monkeypatch):
    for prediction in PREDICTIONS if steps < 1000 else ["eps"]:
        scheduler = diffusers("ddpm").DDPMScheduler(
            1000,
            clip_sample=clip,
            variance_type=f"fixed_{variance}",
            prediction_type=THEIRS[prediction],
            timestep_spacing=spacing,
        )
        config = DiffusionConfig(prediction=prediction, variance=variance, clip=clip)  # pyright: ignore[reportArgumentType]
        ours = walk(table_of(config, SamplerConfig("ddpm", steps, spacing=spacing)))
        assert_same(ours, walk_ddpm(exact(scheduler, "linear", 1000), monkeypatch, steps), CLOSE)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("steps", "spacing"), [case for case in CASES if case[1] != "linspace"])
def test_ddim_is_diffusers(steps, spacing, eta, clip):
    total = 300 if steps == 3 else 1000  # theirs goes down by T // K, so K must divide T
    for prediction in PREDICTIONS if steps < 1000 else ["x0"]:
        scheduler = diffusers("ddim").DDIMScheduler(
            total,
            beta_schedule="linear",
            clip_sample=clip,
            beta_start=1e-4,
            beta_end=0.02,
            prediction_type=THEIRS[prediction],
            timestep_spacing=spacing,
        )
        config = DiffusionConfig(timesteps=total, prediction=prediction, clip=clip)  # pyright: ignore[reportArgumentType]
        ours = walk(table_of(config, SamplerConfig("ddim", steps, eta, spacing)))
        assert_same(ours, walk_ddim(exact(scheduler, "linear", total), eta, steps), CLOSE)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("steps", "spacing"), CASES)
def test_dpm_solver_is_diffusers(steps, spacing, schedule, clip):
    for prediction in PREDICTIONS if steps < 1000 else ["eps"]:
        scheduler = diffusers("dpmsolver_multistep").DPMSolverMultistepScheduler(
            1000,
            algorithm_type="dpmsolver++",
            solver_order=2,
            final_sigmas_type="zero",
            thresholding=clip,  # with sample_max_value 1 their dynamic thresholding is clipping
            sample_max_value=1.0,
            prediction_type=THEIRS[prediction],
            timestep_spacing=spacing,
        )
        config = DiffusionConfig(schedule=schedule, prediction=prediction, clip=clip)  # pyright: ignore[reportArgumentType]
        bar = make_alpha_bar(config)
        scheduler.set_timesteps(steps)
        table, t = table_of(config, SamplerConfig("dpm++", steps, spacing=spacing)), scheduler.timesteps
        assert table.rows[:, 0].tolist() == t.tolist()
        scheduler.sigmas = torch.cat([((1 - bar[t]) / bar[t]).sqrt(), torch.zeros(1, dtype=torch.float64)])
        x, theirs = x_last(), []
        for t_k in t.tolist():
            x = scheduler.step(network(x, t_k), t_k, x, return_dict=False)[0]
            theirs.append(x)
        # Theirs rounds x to float32 in every step, about four half-ulps of it.
        assert_same(walk(table), theirs, 4 * (steps + 1) * 2.0**-24)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_unaltered_float32_schedulers_agree_to_their_own_rounding(prediction, monkeypatch):
    """Their float32 alphas_cumprod is within 5.5e-5 of ours, which u*p + v and s see through a root or two."""
    config = DiffusionConfig(prediction=prediction, variance="small")
    options = {"prediction_type": THEIRS[prediction], "timestep_spacing": "trailing"}
    ddpm = diffusers("ddpm").DDPMScheduler(1000, **options)
    assert_same(walk(table_of(config, SamplerConfig("ddpm", 50))), walk_ddpm(ddpm, monkeypatch, 50), 5.5e-5)
    ddim = diffusers("ddim").DDIMScheduler(1000, beta_end=0.02, beta_start=1e-4, **options)
    assert_same(walk(table_of(config, SamplerConfig("ddim", 50))), walk_ddim(ddim, 0.0, 50), 5.5e-5)
