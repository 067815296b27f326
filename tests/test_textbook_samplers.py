"""The textbook's samplers against Bayes' rule, exact paths, diffusers, and data whose score is known."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep

from ddpm_fast.config import DiffusionConfig
from ddpm_fast.textbook import (
    ForwardProcess,
    choose_timesteps,
    predict,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
)

PREDICTIONS = ["eps", "x0", "v"]
SPACINGS = ["trailing", "leading", "linspace"]
THEIRS: dict[str, Any] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (2, 1, 2, 3)


class Recorder(nn.Module):
    """A network that is any function of x_t and t, and keeps what it was called with."""

    def __init__(self, function: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.function, self.t, self.x = function, list[int](), list[Tensor]()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        assert (t == t[0]).all()
        self.t.append(int(t[0]))
        self.x.append(x.clone())
        return self.function(x, self.t[-1])


class Noise:
    """Normal noise whose k-th drawing can be looked up."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.z = torch.randn((1001, *SHAPE), generator=generator, dtype=torch.float64)
        self.drawn = 0

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        assert tuple(shape) == SHAPE
        self.drawn += 1
        return self.z[self.drawn - 1]


def any_function(x: Tensor, t: int) -> Tensor:
    place = torch.arange(x.numel(), dtype=x.dtype).view(x.shape)
    return 0.6 * torch.tanh(x) + torch.sin(place + t / 100)


def alpha_bar_of(schedule: str, total: int) -> Tensor:
    """In numpy; the linear betas are Ho et al. 2020's, the cosine is Nichol and Dhariwal 2021's."""
    if schedule == "linear":
        return torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, total)))
    curve = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
    curve[-1] = 0.001 * curve[-2]
    return torch.from_numpy(curve[1:] / curve[0])


def process_of(steps: int = 0, spacing: Any = "trailing", total: int = 1000, **config: Any) -> ForwardProcess:
    return ForwardProcess(DiffusionConfig(total, **config), choose_timesteps(total, steps or total, spacing))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_visited_timesteps_are_diffusers(spacing):
    scheduler = scheduling_ddpm.DDPMScheduler(1000, timestep_spacing=spacing)
    for steps in (1, 2, 3, 7, 10, 50, 64, 333, 999, 1000):
        scheduler.set_timesteps(steps)
        assert choose_timesteps(1000, steps, spacing).flip(0).tolist() == scheduler.timesteps[:steps].tolist()


def test_visited_timesteps_are_the_nearest_to_even_strides():
    """At any number of steps; of two that are as near, rounding chooses: 48 trailing steps are not all diffusers'."""
    for steps in range(2, 1001, 23):
        trailing = [Fraction(1000 * (i + 1), steps) - 1 for i in range(steps)]
        linspace = [Fraction(999 * i, steps - 1) for i in range(steps)]
        for spacing, exact in (("trailing", trailing), ("linspace", linspace)):
            found = choose_timesteps(1000, steps, spacing).tolist()  # pyright: ignore[reportArgumentType]
            assert max(abs(t - place) for t, place in zip(found, exact, strict=True)) <= Fraction(1, 2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x_start_and_eps_are_found_again_from_the_true_prediction(prediction):
    process, (x_start, eps) = process_of(prediction=prediction, clip=False), Noise().z[:2]
    for t in (0, 1, 500, 999):
        bar = alpha_bar_of("linear", 1000)[t]
        x_t, v = bar.sqrt() * x_start + (1 - bar).sqrt() * eps, bar.sqrt() * eps - (1 - bar).sqrt() * x_start
        network = Recorder(lambda x, t, v=v: {"eps": eps, "x0": x_start, "v": v}[prediction])
        found = predict(network, x_t, t, process)
        assert network.t == [t]
        assert (found[0] - x_start).abs().max() * bar.sqrt() < 1e-13
        assert (found[1] - eps).abs().max() * (1 - bar).sqrt() < 1e-13


def test_only_x_start_is_clipped_and_only_if_asked():
    x, network = 3 * Noise().z[0], Recorder(any_function)
    x_start, eps = predict(network, x, 500, process_of(clip=False))
    assert x_start.abs().max() > 1
    clipped, same = predict(network, x, 500, process_of(clip=True))
    assert torch.equal(clipped, x_start.clamp(-1, 1))
    assert torch.equal(same, eps)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_ddpm_is_bayes_rule(steps, schedule, variance):
    """Given x_start, x at the next timestep has a prior and a likelihood, both normal: precisions add up."""
    x_start, noise = Noise().z[-1], Noise()
    process = process_of(steps, schedule=schedule, variance=variance, prediction="x0", clip=False)
    network = Recorder(lambda x, t: x_start)
    last = sample_ddpm(network, noise.randn(SHAPE), process, noise)
    xs, bar = [*network.x, last], alpha_bar_of(schedule, 1000)[network.t]
    for k in range(steps - 1):
        alpha = bar[k] / bar[k + 1]
        prior, likelihood = 1 / (1 - bar[k + 1]), alpha / (1 - alpha)
        spread = 1 / (prior + likelihood)
        mean = spread * (prior * bar[k + 1].sqrt() * x_start + likelihood * xs[k] / alpha.sqrt())
        z = (xs[k + 1] - mean) / (spread if variance == "small" else 1 - alpha).sqrt()
        assert (z - noise.z[k + 1]).abs().max() < 1e-6
    assert (last - x_start).abs().max() < 1e-12  # the last step's mean, to which no noise is added
    assert noise.drawn == steps


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpm_solver])
def test_with_the_true_noise_steps_of_any_length_stay_on_the_forward_path(sampler, spacing, prediction):
    (x_start, eps), bars = Noise().z[:2], alpha_bar_of("cosine", 1000)

    def truth(x: Tensor, t: int) -> Tensor:
        v = bars[t].sqrt() * eps - (1 - bars[t]).sqrt() * x_start
        return {"eps": eps, "x0": x_start, "v": v}[prediction]

    process, network = process_of(13, spacing, schedule="cosine", prediction=prediction, clip=False), Recorder(truth)
    first = bars[process.timesteps[-1]]
    x = sampler(network, first.sqrt() * x_start + (1 - first).sqrt() * eps, process)
    assert network.t == process.timesteps.flip(0).tolist()
    for t, x_t in zip(network.t, network.x, strict=True):
        assert (x_t - bars[t].sqrt() * x_start - (1 - bars[t]).sqrt() * eps).abs().max() < 1e-10
    assert (x - x_start).abs().max() < 1e-10


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_ddim_at_eta_1_is_ddpm_with_the_small_variance(steps):
    process = process_of(steps, variance="small", clip=False)
    ours = sample_ddim(Recorder(any_function), Noise().z[0], process, 1.0, Noise())
    truth = sample_ddpm(Recorder(any_function), Noise().z[0], process, Noise())
    assert (ours - truth).abs().max() < 1e-9 * truth.abs().max()


# Whole trajectories of diffusers' schedulers, given alpha_bar in float64


def walk(scheduler: Any, steps: int, take: Callable[[Any, int, int, Tensor], Tensor]) -> list[Tensor]:
    scheduler.alphas_cumprod = alpha_bar_of("linear", 1000)
    scheduler.set_timesteps(steps)
    noise = Noise()
    xs = [noise.randn(SHAPE)]
    for k, t in enumerate(scheduler.timesteps[:steps].tolist()):
        xs.append(take(scheduler, k, t, xs[-1]))
    return xs


def assert_walked(network: Recorder, x: Tensor, theirs: list[Tensor], bound: float) -> None:
    for ours, truth in zip([*network.x, x], theirs, strict=True):
        assert (ours - truth).abs().max() < bound * max(1, truth.abs().max())


SETTINGS = [(p, s, c) for p in PREDICTIONS for s, c in (("trailing", True), ("leading", False), ("linspace", True))]


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(("prediction", "spacing", "clip"), SETTINGS)
def test_ddpm_is_diffusers(prediction, spacing, clip, variance, monkeypatch):
    steps, z = 20, Noise().z

    def take(scheduler: Any, k: int, t: int, x: Tensor) -> Tensor:
        # Theirs adds noise in the last step if that is not at t = 0; ours as in Algorithm 2, never.
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: z[k + 1] * (k < steps - 1))
        return scheduler.step(any_function(x, t), t, x, return_dict=False)[0]

    scheduler = scheduling_ddpm.DDPMScheduler(
        prediction_type=THEIRS[prediction],
        variance_type=f"fixed_{variance}",  # pyright: ignore[reportArgumentType]
        clip_sample=clip,
        timestep_spacing=spacing,
    )
    theirs = walk(scheduler, steps, take)
    network, noise = Recorder(any_function), Noise()
    process = process_of(steps, spacing, prediction=prediction, clip=clip, variance=variance)
    assert_walked(network, sample_ddpm(network, noise.randn(SHAPE), process, noise), theirs, 1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize(("prediction", "spacing", "clip"), SETTINGS)
def test_ddim_is_diffusers(prediction, spacing, clip, eta):
    spacing = "trailing" if spacing == "linspace" else spacing  # where theirs does not end on the image
    z = Noise().z

    def take(scheduler: Any, k: int, t: int, x: Tensor) -> Tensor:
        noise = {"eta": eta, "variance_noise": z[k + 1] if eta else None}
        return scheduler.step(any_function(x, t), t, x, return_dict=False, **noise)[0]

    scheduler = scheduling_ddim.DDIMScheduler(
        prediction_type=THEIRS[prediction], clip_sample=clip, timestep_spacing=spacing
    )
    theirs = walk(scheduler, 20, take)
    network, noise = Recorder(any_function), Noise()
    process = process_of(20, spacing, prediction=prediction, clip=clip)
    x = sample_ddim(network, noise.randn(SHAPE), process, eta, noise)
    assert_walked(network, x, theirs, 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_is_diffusers(prediction, clip, steps):
    bars = alpha_bar_of("linear", 1000)
    scheduler = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler(
        prediction_type=THEIRS[prediction],
        thresholding=clip,  # which clips where values may be 1 at most
        sample_max_value=1.0,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )

    def take(scheduler: Any, k: int, t: int, x: Tensor) -> Tensor:
        visited = bars[scheduler.timesteps]
        scheduler.sigmas = torch.cat([((1 - visited) / visited).sqrt(), torch.zeros(1)])  # in float64
        return scheduler.step(any_function(x, t), t, x, return_dict=False)[0]

    theirs = walk(scheduler, steps, take)
    network, noise = Recorder(any_function), Noise()
    x = sample_dpm_solver(network, noise.randn(SHAPE), process_of(steps, prediction=prediction, clip=clip))
    assert_walked(network, x, theirs, (steps + 1) * 2.0**-22)  # theirs rounds x to float32 in every step


@pytest.mark.parametrize(("sampler", "steps"), [(sample_ddpm, 1000), (sample_ddim, 200), (sample_dpm_solver, 40)])
def test_normal_data_are_sampled_with_their_mean_and_variance(sampler, steps):
    """For x_start of mean 0.3 and deviation 0.5, E[x_start | x_t] is known: nothing else is asked of a network."""
    mean, variance, bars = 0.3, 0.25, alpha_bar_of("cosine", 1000)

    def best(x: Tensor, t: int) -> Tensor:
        return mean + bars[t].sqrt() * variance / (bars[t] * variance + 1 - bars[t]) * (x - bars[t].sqrt() * mean)

    process = process_of(steps, schedule="cosine", variance="small", prediction="x0", clip=False)
    torch.manual_seed(0)
    x = sampler(Recorder(best), torch.randn(40_000, 1, 1, 1, dtype=torch.float64), process)
    assert float(x.mean()) == pytest.approx(mean, abs=0.01)
    assert float(x.var()) == pytest.approx(variance, rel=0.03)
