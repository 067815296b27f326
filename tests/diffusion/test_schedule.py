"""The forward process against closed forms in float64 and diffusers' schedules."""

import numpy as np
import pytest
import torch
from scipy import stats

from ddpm_fast.config import DiffusionConfig, Prediction
from ddpm_fast.diffusion import schedule
from ddpm_fast.diffusion.schedule import TrainingTable

SCHEDULES = ["linear", "cosine", "sigmoid"]
PREDICTIONS: list[Prediction] = ["eps", "x0", "v"]
TIMESTEPS = [1, 2, 10, 1000]


def closed_form(name: str, timesteps: int) -> np.ndarray:
    """The papers' betas, in numpy."""
    if name == "linear":
        return 1e-4 + (0.02 - 1e-4) * np.arange(timesteps) / max(timesteps - 1, 1)
    u = np.arange(timesteps + 1) / timesteps
    if name == "cosine":
        alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    else:
        sigmoid = 1 / (1 + np.exp(-(6 * u - 3)))
        alpha_bar = (sigmoid[-1] - sigmoid) / (sigmoid[-1] - sigmoid[0])
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


@pytest.mark.parametrize("timesteps", TIMESTEPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_are_the_closed_form(name, timesteps):
    found = schedule.betas(DiffusionConfig(timesteps=timesteps, schedule=name))
    assert found.dtype == torch.float64
    # 1 - a/b of two rounded numbers near 1 is good to a few 2.2e-16, not to that share of itself.
    np.testing.assert_allclose(found.numpy(), closed_form(name, timesteps), rtol=1e-13, atol=2e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_bar_is_the_product_and_telescopes(name):
    found = schedule.make_alpha_bar(DiffusionConfig(schedule=name)).numpy()
    np.testing.assert_allclose(found, np.cumprod(1 - closed_form(name, 1000)), rtol=1e-12)
    if name == "cosine":
        u = np.arange(1, 1000) / 1000
        bar = (np.cos((u + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
        np.testing.assert_allclose(found[:-1], bar, rtol=1e-9)


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedule_is_diffusers(name, theirs):
    diffusers = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs)
    config = DiffusionConfig(schedule=name)
    ulp = 2.0**-24
    assert (schedule.betas(config) - scheduler.betas).abs().max() <= 2 * ulp
    # Theirs is float32: their products drift from ours, by 5.5e-5 at most up to where the last beta is clipped.
    ratio = scheduler.alphas_cumprod.double() / schedule.make_alpha_bar(config)
    assert (ratio[:-1] - 1).abs().max() <= 5.5e-5
    # 1 - 0.999 in float32 alone is off by half an ulp of 0.999 over 0.001.
    assert (ratio[-1] - 1).abs() <= 5.5e-5 + ulp / 0.001


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_falls_strictly_from_data_to_noise(name):
    bar = schedule.make_alpha_bar(DiffusionConfig(schedule=name))
    assert (bar.diff() < 0).all()
    assert bar[0] > 0.999
    assert 0 < bar[-1] < 1e-4


def test_beta_range_is_the_configurations():
    found = schedule.betas(DiffusionConfig(timesteps=5, beta_start=0.1, beta_end=0.5))
    np.testing.assert_allclose(found.numpy(), [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_and_x_t_give_the_data_back(name, prediction):
    table = schedule.training_table(DiffusionConfig(schedule=name, prediction=prediction), dtype=torch.float64)
    row = TrainingTable(*table.T)
    generator = torch.Generator().manual_seed(0)
    x_start, eps = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    x_t = row.signal * x_start + row.noise * eps
    target = row.target_eps * eps + row.target_x_start * x_start
    # Salimans and Ho 2022, Appendix D: v = a*eps - b*x, so x = a*x_t - b*v; Ho et al. 2020, Eq. 15 for eps.
    bar = torch.from_numpy(np.cumprod(1 - closed_form(name, 1000)))
    a, b = bar.sqrt(), (1 - bar).sqrt()
    found = {"eps": (x_t - b * target) / a, "x0": target, "v": a * x_t - b * target}[prediction]
    assert ((found - x_start) * (a if prediction == "eps" else 1)).abs().max() < 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_of_x_t_is_one(name):
    config = DiffusionConfig(schedule=name)
    row = TrainingTable(*schedule.training_table(config, dtype=torch.float64).T)
    assert (row.signal**2 + row.noise**2 - 1).abs().max() < 1e-15
    assert (row.signal**2 - schedule.make_alpha_bar(config)).abs().max() < 1e-15


def test_table_is_float32_rounded_from_float64():
    config = DiffusionConfig(prediction="v")
    table = schedule.training_table(config, 5.0)
    assert table.dtype == torch.float32
    assert table.shape == (1000, 5)
    assert torch.equal(table, schedule.training_table(config, 5.0, torch.float64).float())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_ones_without_min_snr(prediction):
    table = schedule.training_table(DiffusionConfig(prediction=prediction))
    assert TrainingTable(*table.T).weight.eq(1).all()


@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_the_papers(prediction, gamma):
    bar = np.cumprod(1 - closed_form("linear", 1000))
    snr = bar / (1 - bar)
    clamped = np.minimum(snr, gamma)
    expected = {"x0": clamped, "eps": clamped / snr, "v": clamped / (snr + 1)}[prediction]
    table = schedule.training_table(DiffusionConfig(prediction=prediction), gamma, torch.float64)
    np.testing.assert_allclose(TrainingTable(*table.T).weight.numpy(), expected, rtol=1e-11)


def test_min_snr_weighs_an_error_of_x_start_alike_in_every_prediction():
    generator = torch.Generator().manual_seed(0)
    x_start, wrong, eps = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    losses = []
    for prediction in PREDICTIONS:
        config = DiffusionConfig(prediction=prediction)
        row = TrainingTable(*schedule.training_table(config, 5.0, torch.float64).T)
        x_t = row.signal * x_start + row.noise * eps
        implied_eps = (x_t - row.signal * wrong) / row.noise
        losses.append(row.weight * (row.target_eps * (eps - implied_eps) + row.target_x_start * (x_start - wrong)) ** 2)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_laplace_is_the_distribution_of_log_snr_but_for_a_uniform_share(name):
    """Between neighbouring midpoints of log SNR lies what SciPy's distribution says."""
    config = DiffusionConfig(1000, name)
    shares = schedule.timestep_shares(config, "laplace")
    assert float(shares.sum()) == pytest.approx(1, abs=1e-12)
    alpha_bar = np.cumprod(1 - schedule.betas(config).numpy())
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    edges = np.concatenate([[log_snr[0]], (log_snr[1:] + log_snr[:-1]) / 2, [log_snr[-1]]])
    laplace = -np.diff(stats.laplace(loc=0.5, scale=1).cdf(edges))
    expected = 0.15 / 1000 + 0.85 * laplace / laplace.sum()
    assert np.abs(shares.numpy() - expected).sum() < 0.01
    assert float(shares.min()) >= 0.15 / 1000


def test_words_are_cut_where_the_shares_add_up():
    config = DiffusionConfig(1000, "cosine")
    assert schedule.timestep_thresholds(config, "uniform") is None
    thresholds = schedule.timestep_thresholds(config, "laplace")
    assert thresholds is not None
    assert thresholds.dtype == torch.int64
    widths = torch.cat([thresholds, torch.tensor([2**32])]).diff(prepend=torch.tensor([0]))
    torch.testing.assert_close(widths.double() / 2**32, schedule.timestep_shares(config, "laplace"), rtol=0, atol=1e-9)
