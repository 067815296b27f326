"""The textbook's process, U-Net and training against closed forms and diffusers; never against the engine."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from bench.peers.diffusers import unet as diffusers_unet
from ddpm_fast import textbook
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.presets import PRESETS
from ddpm_fast.textbook import ForwardProcess

SCHEDULES = ["linear", "cosine", "sigmoid"]
PREDICTIONS = ["eps", "x0", "v"]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_it_is_at_most_300_lines_and_imports_torch_and_the_configuration():
    source = Path(textbook.__file__).read_text()
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    standard = {"copy", "collections", "collections.abc", "typing"}
    assert names == {"torch", "torch.nn.functional", "ddpm_fast.config"} | standard
    assert len(source.splitlines()) <= 300


# The forward process


def closed_form(schedule: str, total: int) -> np.ndarray:
    """alpha_bar in numpy: the linear betas' product; the curves' ratios to their start, each step clipped at 0.999."""
    if schedule == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, total))
    u = np.arange(total + 1) / total
    if schedule == "cosine":
        curve = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    else:
        curve = 1 / (1 + np.exp(-3)) - 1 / (1 + np.exp(3 - 6 * u))
    curve[-1] = max(curve[-1], 0.001 * curve[-2])  # the only step that is clipped at these lengths
    return curve[1:] / curve[0]


@pytest.mark.parametrize("total", [2, 10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_bar_is_the_closed_form(schedule, total):
    process = ForwardProcess(DiffusionConfig(total, schedule))
    expected = closed_form(schedule, total)
    np.testing.assert_allclose(process.alpha_bar.numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(process.alpha_bar_prev.numpy(), [1, *expected[:-1]], rtol=1e-10)


@pytest.mark.parametrize(("schedule", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_alpha_bar_is_diffusers(schedule, theirs):
    process = ForwardProcess(DiffusionConfig(schedule=schedule))
    ratio = DDPMScheduler(beta_schedule=theirs).alphas_cumprod / process.alpha_bar
    # Theirs is float32, whose products drift; 1 - 0.999, the last step of the cosine, is good to 3e-5 there.
    assert (ratio - 1).abs().max() < 1e-4


def test_the_linear_schedule_has_the_configured_ends():
    betas = textbook.make_betas(DiffusionConfig(5, beta_start=0.1, beta_end=0.5))
    np.testing.assert_allclose(betas.numpy(), [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-14)


# The U-Net

UNETS = {
    "non-square": UNetConfig(3, 8, 12, 16, (1, 2), 2, (4,), dropout=0.3, groups=4),
    "grey": UNetConfig(1, 8, 8, 8, (1, 1, 2), 1, (8,), dropout=0.5, groups=4),
    "attention-at-three": UNetConfig(2, 16, 16, 12, (1, 2, 1), 1, (16, 8, 4), groups=3),
}


class Pattern(nn.Module):
    """Dropout of fixed places: nn.Dropout's depend on a tensor's layout."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.numel()).view(x.shape)
        return x * (place * 7 % 10 >= 10 * self.probability) / (1 - self.probability)


@pytest.mark.parametrize(("training", "t", "bound"), [(True, [3, 0], 1e-6), (False, [999, 250], 1e-4)])
@pytest.mark.parametrize("name", UNETS)
def test_the_unet_and_its_gradients_are_diffusers(name, training, t, bound):
    """To the rounding of their sinusoids, which are float32: that of an angle of 999 is 6e-5."""
    config = UNETS[name]
    ours, theirs = textbook.UNet(config), diffusers_unet(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in ours.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(std=spread, generator=generator)
            parameter += "norm" in parameter_name and parameter_name.endswith("weight")
    theirs.load_state_dict(ours.state_dict())
    x = normal(2, config.image_channels, config.height, config.width)
    results = []
    for net in (ours.double(), theirs.double()):
        for module in list(net.modules()):
            if training and type(module).__name__ in ("ResBlock", "ResnetBlock2D"):
                module.dropout = Pattern(config.dropout)
        out = net.train(training)(x, torch.tensor(t))
        out = out if isinstance(out, Tensor) else out.sample
        (out * torch.sin(torch.arange(out.numel()).view_as(out))).sum().backward()
        results.append([out.detach(), *(p.grad for _, p in sorted(net.named_parameters()))])
    for found, truth in zip(*results, strict=True):
        assert (found - truth).abs().max() < bound * max(truth.abs().max(), 1e-2)


def test_the_paper_networks_have_the_published_sizes():
    for preset, count in (("cifar10", 35_746_307), ("church256", 113_673_219)):
        with torch.device("meta"):
            unet = textbook.UNet(PRESETS[preset].unet)
        assert sum(p.numel() for p in unet.parameters()) == count


def test_a_name_that_the_textbook_lacks_is_refused():
    config = DiffusionConfig()
    for field in ("schedule", "prediction"):
        object.__setattr__(config, field, "unknown")  # past the dataclass, which refuses it as well
    with pytest.raises(KeyError, match="unknown"):
        textbook.make_betas(config)
    object.__setattr__(config, "schedule", "linear")
    with pytest.raises(KeyError, match="unknown"):
        textbook.training_loss(nn.Identity(), torch.zeros(1, 3, 8, 8), Config(diffusion=config))


def test_initial_weights_are_xaviers_and_branches_begin_near_zero():
    torch.manual_seed(0)
    unet = textbook.UNet(UNetConfig(3, 8, 8, 64, (1, 2), 1, (4,)))
    weights = dict(unet.named_parameters())
    for name, shrink in (("mid_block.resnets.0.conv1", 1), ("mid_block.resnets.0.conv2", 1e-5), ("conv_out", 1e-5)):
        weight = weights[f"{name}.weight"].detach()
        fans = (weight.shape[0] + weight.shape[1]) * 9
        assert float(weight.abs().max()) == pytest.approx(shrink * (6 / fans) ** 0.5, rel=0.01)
        assert float(weight.std()) == pytest.approx(shrink * (2 / fans) ** 0.5, rel=0.05)
        assert not weights[f"{name}.bias"].any()
    assert weights["mid_block.attentions.0.to_out.0.weight"].abs().max() < 1e-5
    assert 0 < unet(torch.randn(2, 3, 8, 8), torch.tensor([0, 9])).abs().max() < 1e-3


# Training


class Given:
    """Random numbers given in advance, by the names of torch's functions."""

    def __init__(self, randn: list[Tensor], randint: Tensor | None = None, rand: Tensor | None = None) -> None:
        self.randn_left, self.t, self.u = list(randn), randint, rand

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        value = self.randn_left.pop(0)
        assert value.shape == tuple(shape)
        return value

    def randint(self, high: int, shape: tuple[int]) -> Tensor:
        assert self.t is not None
        assert self.t.shape == shape
        assert self.t.max() < high
        return self.t

    def rand(self, shape: tuple[int, ...]) -> Tensor:
        assert self.u is not None
        return self.u.view(shape)


class Scale(nn.Module):
    """The smallest network: one weight times x_t."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_papers(prediction, gamma, flip):
    config = Config(
        diffusion=DiffusionConfig(prediction=prediction),
        data=DataConfig(flip=flip),
        training=TrainingConfig(min_snr_gamma=gamma),
    )
    images = torch.arange(5 * 6).view(5, 1, 2, 3).mul(8).to(torch.uint8)
    t, eps, u = torch.tensor([0, 10, 100, 500, 999]), normal(5, 1, 2, 3), torch.tensor([0.1, 0.9, 0.49, 0.51, 0.3])
    found = textbook.training_loss(Scale(0.7), images, config, Given([eps], t, u))
    losses = []
    for image, noise, uniform, bar in zip(images.numpy(), eps.numpy(), u, closed_form("linear", 1000)[t], strict=True):
        x_start = image / 127.5 - 1
        if flip and uniform < 0.5:
            x_start = x_start[:, :, ::-1]
        x_t = np.sqrt(bar) * x_start + np.sqrt(1 - bar) * noise
        v = np.sqrt(bar) * noise - np.sqrt(1 - bar) * x_start
        # What a wrong prediction makes of x_start, weighted by min(SNR, gamma); SNR makes that the plain error of eps.
        error = {
            "eps": -np.sqrt((1 - bar) / bar) * (0.7 * x_t - noise),
            "x0": 0.7 * x_t - x_start,
            "v": -np.sqrt(1 - bar) * (0.7 * x_t - v),
        }[prediction]
        snr = bar / (1 - bar)
        plain = {"eps": snr, "x0": 1, "v": 1 / (1 - bar)}[prediction]
        losses.append((min(snr, gamma) if gamma else plain) * np.mean(error**2))
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_by_default_timesteps_are_uniform_flips_are_fair_and_noise_is_normal():
    class Look(Scale):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.seen = x, t
            return super().forward(x, t)

    config = Config(diffusion=DiffusionConfig(4, beta_start=1e-4, beta_end=1e-4), data=DataConfig(flip=True))
    look, images = Look(1.0), torch.tensor([0, 255], dtype=torch.uint8).expand(10_000, 1, 1, 2)
    torch.manual_seed(0)
    textbook.training_loss(look, images, config)
    x, t = look.seen
    assert (t.bincount() / 10_000 - 1 / 4).abs().max() < 0.02  # more than four standard deviations, as below
    x_start, alpha_bar = x.sign(), (1 - 1e-4) ** (t + 1).double().view(-1, 1, 1, 1)
    assert (x_start.sum((1, 2, 3)) == 0).all()
    assert abs(float((x_start[:, 0, 0, 0] == 1).double().mean()) - 0.5) < 0.02
    eps = (x - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
    assert abs(float(eps.mean())) < 0.03
    assert abs(float(eps.square().mean()) - 1) < 0.05
    assert abs(float((eps[..., 0] * eps[..., 1]).mean())) < 0.04


@pytest.mark.parametrize(("cooldown", "beta2"), [(0.0, 0.999), (0.125, 0.9)])
@pytest.mark.parametrize("clip_norm", [0.0, 0.2])
@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_training_is_adam_by_hand_and_the_average_its_closed_form(warmup_steps, clip_norm, cooldown, beta2):
    steps, beta = range(30, 40), 0.02
    rates = {"steps": 40, "learning_rate": 0.1, "warmup_steps": 32 + warmup_steps, "cooldown": cooldown}
    training = TrainingConfig(**rates, adam_beta2=beta2, clip_norm=clip_norm, ema_decay=0.8)
    config = Config(diffusion=DiffusionConfig(1, beta_start=beta, beta_end=beta), training=training)
    unet, ema = Scale(-0.5), Scale(2.0)
    images, noise = torch.tensor([51, 204, 255], dtype=torch.uint8).view(3, 1, 1, 1), normal(10, 3, 1, 1, 1)
    given = Given(list(noise), torch.zeros(3, dtype=torch.int64))
    weights, averages, losses = [], [], []
    for loss in textbook.train(unet, ema, ((step, images) for step in steps), config, given):
        losses.append(loss)
        weights.append(unet.weight.item())
        averages.append(ema.weight.item())

    w, m, v, clipped = -0.5, 0.0, 0.0, 0
    for i, step in enumerate(steps):  # Kingma and Ba 2015, Algorithm 1
        eps, x_start = noise[i].flatten().numpy(), np.array([-0.6, 0.6, 1.0])
        x_t = np.sqrt(1 - beta) * x_start + np.sqrt(beta) * eps
        assert losses[i] == pytest.approx(np.mean((w * x_t - eps) ** 2), rel=1e-6)
        g = np.mean(2 * x_t * (w * x_t - eps))
        if clip_norm and abs(g) > clip_norm:
            g, clipped = np.sign(g) * clip_norm, clipped + 1
        m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g**2
        rate = 0.1 * min(1, (step + 1) / (32 + warmup_steps)) * (min(1, (40 - step) / 5) if cooldown else 1)
        w -= rate * (m / (1 - 0.9 ** (i + 1))) / (np.sqrt(v / (1 - beta2 ** (i + 1))) + 1e-8)
        assert weights[i] == pytest.approx(w, rel=1e-5)
    assert bool(clipped) == bool(clip_norm)

    decays = np.array([min(0.8, (1 + step) / (10 + step)) for step in steps])
    assert decays[0] < decays[-1] == 0.8
    kept = np.array([np.prod(decays[i + 1 :]) for i in range(len(steps))])
    assert averages[-1] == pytest.approx(2 * np.prod(decays) + np.sum(kept * (1 - decays) * weights), rel=1e-9)


def test_main_writes_a_grid_of_images(tmp_path, monkeypatch, capsys):
    """With two steps of training, and sampling that draws the corner of each image white."""
    from PIL import Image

    def sample(unet: nn.Module, x: Tensor, process: ForwardProcess) -> Tensor:
        x = torch.full_like(x, -1)
        x[:, :, 0, 0] = 2
        return x

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(textbook, "TrainingConfig", lambda **options: replace(TrainingConfig(**options), steps=2))
    monkeypatch.setattr(textbook, "sample_ddpm", sample)
    textbook.main()
    assert "loss" in capsys.readouterr().out
    pixels = np.asarray(Image.open("textbook-digits.png"))
    assert pixels.shape == (640, 640)
    assert pixels[8:16, 8:16].min() == 255
    assert pixels.sum() == 255 * 64 * 8 * 8
