"""All of DDPM in one file, to be read beside the paper: Ho, Jain and Abbeel 2020, arXiv 2006.11239.

    ForwardProcess         turns an image into noise, in T small steps
    UNet                   looks at a noisy image and tells the noise from the image
    training_loss, train   teach it to: Algorithm 1
    sample_ddpm            goes back from noise to an image: Algorithm 2
    sample_ddim            does so in fewer steps, and with no fresh noise where eta is 0 (Song et al. 2021)
    sample_dpm_solver      does so in fewer still: DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095)
    guided                 keeps them to a label (Ho and Salimans 2022), or from another's faults (Karras et al. 2024)
    main                   learns handwritten digits on a CPU in a minute or two: `python -m ddpm_fast.textbook`

Equations, algorithms and sections are the paper's unless another is named. The code's t = 0..T-1 is the paper's t - 1;
x_start is its x_0, an image in [-1, 1]; x_t is that image at timestep t; eps is standard normal noise.
Shapes: N images, C channels, H x W pixels, T timesteps, K of them visited, E = 4 * channels in the time embedding.

`random` is where random numbers come from: torch, or whatever has its randn, randint, rand and bernoulli. Given the
engine's numbers, this file computes the engine's losses and images, and the tests hold the engine to it. What the
engine adds changes no formula: reading images, seeds, gradient accumulation, bfloat16, kernels, checkpoints.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.config import Config, DiffusionConfig, Spacing, TrainingConfig, UNetConfig


def make_betas(config: DiffusionConfig) -> Tensor:
    """Return the variance of the noise that each step of the forward process adds: [T]."""
    if config.schedule == "linear":  # Section 4
        return torch.linspace(config.beta_start, config.beta_end, config.timesteps, dtype=torch.float64)
    u = torch.linspace(0, 1, config.timesteps + 1, dtype=torch.float64)
    cosine = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2  # Nichol and Dhariwal 2021, Equation 17
    sigmoid = torch.sigmoid(3 - 6 * u)  # Chen 2023, Algorithm 1, but for the scale, which cancels out
    alpha_bar = {"cosine": cosine, "sigmoid": sigmoid - sigmoid[-1]}[config.schedule]
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


class ForwardProcess:
    """q(x_t | x_start) is normal, with mean sqrt(alpha_bar[t]) * x_start and variance 1 - alpha_bar[t] (Equation 4)."""

    def __init__(self, config: DiffusionConfig, visited: Tensor | None = None) -> None:
        self.config = config  # K visited timesteps make K longer steps: Nichol and Dhariwal 2021, Section 4
        self.timesteps = torch.arange(config.timesteps) if visited is None else visited  # what the U-Net is told
        self.alpha_bar = torch.cumprod(1 - make_betas(config), dim=0)[self.timesteps]  # [T] or [K] float64
        self.alpha_bar_prev = torch.cat([torch.ones_like(self.alpha_bar[:1]), self.alpha_bar[:-1]])  # that of t - 1


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut, told the timestep in between: [N, C, H, W] -> [N, C_out, H, W]."""

    def __init__(self, channels_in: int, channels_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.channels, channels_out)
        self.norm2 = nn.GroupNorm(config.groups, channels_out, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Every pixel attends to every other, with one head, beside a shortcut: [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # [N, H*W, C]
        q, k, v = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)
        weights = torch.softmax(q @ k.transpose(1, 2) / x.shape[1] ** 0.5, dim=2)  # [N, H*W, H*W]
        return x + self.to_out(weights @ v).transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """The layers at one resolution: ResBlocks, each followed by attention or nothing, then a resizer or none."""

    def __init__(self, inputs: list[int], width: int, attends: bool, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, width, config) for channels in inputs)
        self.attentions = nn.ModuleList(Attention(width, config) if attends else nn.Identity() for _ in inputs)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()  # the U-Net adds one to either


class UNet(nn.Module):
    """Predicts eps, x_start or v (Appendix B); parameters are named as in diffusers' UNet2DModel."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        attends = [config.height >> i in config.attention_resolutions for i in range(len(widths))]
        E, last = 4 * config.channels, len(widths) - 1
        linear_1, linear_2 = nn.Linear(config.channels, E), nn.Linear(E, E)
        self.time_embedding = nn.Sequential(OrderedDict(linear_1=linear_1, silu=nn.SiLU(), linear_2=linear_2))
        self.class_embedding = nn.Embedding(config.classes + 1, E) if config.classes else None  # the last: no label
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down_blocks: Any = nn.ModuleList()
        skips = [widths[0]]  # channels of each tensor that the way down hands to the way up
        for i, width in enumerate(widths):
            level = Level([skips[-1]] + [width] * (config.res_blocks - 1), width, attends[i], config)
            if i < last:  # padded on the right and bottom only, as in TensorFlow, which the paper used
                pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)
                level.downsamplers.append(nn.Sequential(OrderedDict(pad=pad, conv=conv)))
            self.down_blocks.append(level)
            skips += [width] * (config.res_blocks + (i < last))
        self.mid_block: Any = Level([widths[-1]] * 2, widths[-1], True, config)
        self.mid_block.attentions[1] = nn.Identity()  # ResBlock, attention, ResBlock
        self.up_blocks: Any = nn.ModuleList()
        channels = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            inputs = [(width if j else channels) + skips.pop() for j in range(config.res_blocks + 1)]
            level, channels = Level(inputs, width, attends[i], config), width
            if i > 0:
                repeat, conv = nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)
                level.upsamplers.append(nn.Sequential(OrderedDict(repeat=repeat, conv=conv)))
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)
        for name, parameter in self.named_parameters():  # initial weights, as in the paper's code
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:  # what a residual branch adds, and the output, begin near zero
                near_zero = name.endswith(("conv2.weight", "to_out.0.weight", "conv_out.weight"))
                nn.init.xavier_uniform_(parameter, gain=1e-5 if near_zero else 1.0)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict from x_t [N, C, H, W], t [N] and, if it knows classes, labels [N]: [N, C, H, W]."""
        half, dtype = self.config.channels // 2, self.conv_in.weight.dtype
        angles = t[:, None] * torch.logspace(0, -4, half, dtype=torch.float64, device=t.device)  # Vaswani et al. 2017
        embedding = self.time_embedding(torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype))  # [N, E]
        embedding = embedding if self.class_embedding is None else embedding + self.class_embedding(labels)
        skips = [h := self.conv_in(x.to(dtype))]  # from float64 in training
        for level in self.down_blocks:
            for block, attention in zip(level.resnets, level.attentions, strict=True):
                skips.append(h := attention(block(h, embedding)))
            skips += [h := downsample(h) for downsample in level.downsamplers]
        for block, attention in zip(self.mid_block.resnets, self.mid_block.attentions, strict=True):
            h = attention(block(h, embedding))
        for level in self.up_blocks:
            for block, attention in zip(level.resnets, level.attentions, strict=True):
                h = attention(block(torch.cat([h, skips.pop()], dim=1), embedding))
            for upsample in level.upsamplers:
                h = upsample(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def laplace_shares(config: DiffusionConfig) -> Tensor:
    """Return how often each t is drawn, most where signal and noise are alike: [T]; Hang et al. 2025, Table 1."""
    log_snr = ForwardProcess(config).alpha_bar.logit()
    laplace = torch.exp(-(log_snr - 0.5).abs()) * torch.gradient(log_snr)[0].abs()
    return 0.15 / config.timesteps + 0.85 * laplace / laplace.sum()  # some at both ends, too


def training_loss(unet: nn.Module, images: Tensor, config: Config, random: Any = torch, *labels: Tensor) -> Tensor:
    """Return the loss of images [N, C, H, W] in 0..255, and perhaps labels [N]: Algorithm 1, lines 2 to 5."""
    N, prediction, gamma = len(images), config.diffusion.prediction, config.training.min_snr_gamma
    x_start = images / 127.5 - 1
    if config.data.flip:
        x_start = torch.where(random.rand((N, 1, 1, 1)) < 0.5, x_start.flip(-1), x_start)
    t = random.randint(config.diffusion.timesteps, (N,))  # line 3
    if config.training.timestep_density == "laplace":
        t = torch.bucketize(random.rand((N,)), laplace_shares(config.diffusion).cumsum(0)[:-1], right=True)
    eps = random.randn(x_start.shape)  # line 4
    alpha_bar = ForwardProcess(config.diffusion).alpha_bar[t].view(N, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * eps  # Equation 4
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_start  # Salimans and Ho 2022, Appendix D
    target = {"eps": eps, "x0": x_start, "v": v}[prediction]
    snr = alpha_bar / (1 - alpha_bar)  # min-SNR weights the error of x_start by min(snr, gamma): Hang et al. 2023
    weight = snr.clamp(max=gamma) / {"eps": snr, "x0": 1, "v": snr + 1}[prediction] if gamma > 0 else 1
    p, none = torch.full((N,), config.training.label_dropout), config.unet.classes
    told = [each.masked_fill(random.bernoulli(p).bool(), none) for each in labels]  # Ho and Salimans 2022, Algorithm 1
    return (weight * (target - unet(x_t, t, *told)) ** 2).mean()  # line 5, Equation 14


def train(
    unet: nn.Module, ema: nn.Module, batches: Iterable[tuple[Any, ...]], config: Config, random: Any = torch
) -> Iterator[float]:
    """Train on batches (number, images, labels), let ema follow, yield each loss: Algorithm 1, as in Appendix B."""
    training = config.training
    optimizer = torch.optim.Adam(unet.parameters(), betas=(0.9, training.adam_beta2))
    for step, images, *labels in batches:
        loss = training_loss(unet.train(), images, config, random, *labels)
        optimizer.zero_grad()
        loss.backward()
        if training.clip_norm > 0:
            nn.utils.clip_grad_norm_(unet.parameters(), training.clip_norm)
        rise = min(1, (step + 1) / max(training.warmup_steps, 1))
        fall = min(1, (training.steps - step) / training.cooldown_steps) if training.cooldown_steps else 1
        optimizer.param_groups[0]["lr"] = training.learning_rate * rise * fall
        optimizer.step()
        decay = min(training.ema_decay, (1 + step) / (10 + step))
        for average, weight in zip(ema.parameters(), unet.parameters(), strict=True):
            average.data = decay * average.data + (1 - decay) * weight.data
        yield loss.item()


def choose_timesteps(total: int, steps: int, spacing: Spacing) -> Tensor:
    """Choose which K = steps of T = total timesteps a sampler visits: [K], ascending (Lin et al. 2024, Table 2)."""
    trailing = (total - torch.arange(steps).double() * (total / steps)).round().long().flip(0) - 1
    linspace = torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long()
    return {"trailing": trailing, "leading": torch.arange(steps) * (total // steps), "linspace": linspace}[spacing]


def guided(own: Any, other: Any, strength: float) -> Any:
    """Return a network that goes on from other, which is own without labels, or a worse one, through own and beyond."""
    return lambda x_t, t: other(x_t, t) + strength * (own(x_t, t) - other(x_t, t))


def predict(unet: nn.Module, x_t: Tensor, t: int, process: ForwardProcess) -> tuple[Tensor, Tensor]:
    """Return the x_start and eps that x_t is made of according to the U-Net; x_start is clipped if configured so."""
    output = unet(x_t, process.timesteps[t].expand(len(x_t)))
    a, b = process.alpha_bar[t].sqrt(), (1 - process.alpha_bar[t]).sqrt()
    x_start, eps = {
        "eps": ((x_t - b * output) / a, output),  # Equation 15
        "x0": (output, (x_t - a * output) / b),
        "v": (a * x_t - b * output, b * x_t + a * output),  # Salimans and Ho 2022, Appendix D
    }[process.config.prediction]
    return x_start.clamp(-1, 1) if process.config.clip else x_start, eps


@torch.no_grad()
def sample_ddpm(unet: nn.Module, x: Tensor, process: ForwardProcess, random: Any = torch) -> Tensor:
    """Turn noise x [N, C, H, W] into images: Algorithm 2, with Equation 7's mean, so that x_start can be clipped."""
    for t in reversed(range(len(process.timesteps))):
        x_start, _ = predict(unet, x, t, process)
        alpha_bar, alpha_bar_prev = process.alpha_bar[t], process.alpha_bar_prev[t]
        alpha, beta = alpha_bar / alpha_bar_prev, 1 - alpha_bar / alpha_bar_prev
        mean = (alpha_bar_prev.sqrt() * beta * x_start + alpha.sqrt() * (1 - alpha_bar_prev) * x) / (1 - alpha_bar)
        posterior_variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta  # Equation 7
        variance = {"large": beta, "small": posterior_variance}[process.config.variance]  # Section 3.2
        x = mean + variance.sqrt() * random.randn(x.shape) if t > 0 else mean
    return x


@torch.no_grad()
def sample_ddim(unet: nn.Module, x: Tensor, process: ForwardProcess, eta: float = 0.0, random: Any = torch) -> Tensor:
    """Turn noise into images: Song et al. 2021, Equations 12 and 16, whose alpha is our alpha_bar."""
    for t in reversed(range(len(process.timesteps))):
        x_start, eps = predict(unet, x, t, process)
        alpha_bar, alpha_bar_prev = process.alpha_bar[t], process.alpha_bar_prev[t]
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
        x = alpha_bar_prev.sqrt() * x_start + (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * eps
        x = x + sigma * random.randn(x.shape) if sigma > 0 else x
    return x


@torch.no_grad()
def sample_dpm_solver(unet: nn.Module, x: Tensor, process: ForwardProcess) -> Tensor:
    """Turn noise into images: Lu et al. 2022, Algorithm 2, whose alpha and sigma are the weights in Equation 4."""
    alpha, sigma = process.alpha_bar.sqrt(), (1 - process.alpha_bar).sqrt()
    alpha_prev, sigma_prev = process.alpha_bar_prev.sqrt(), (1 - process.alpha_bar_prev).sqrt()
    h = (alpha_prev / sigma_prev).log() - (alpha / sigma).log()  # steps in lambda; infinite at t = 0
    x_start_before = None
    for t in reversed(range(len(process.timesteps))):
        D = x_start = predict(unet, x, t, process)[0]
        if x_start_before is not None and t > 0:  # else first order: at the first step, and at the infinite one
            D = x_start + h[t] / (2 * h[t + 1]) * (x_start - x_start_before)  # their r is h[t + 1] / h[t]
        x = sigma_prev[t] / sigma[t] * x - alpha_prev[t] * (torch.exp(-h[t]) - 1) * D
        x_start_before = x_start
    return x


def main() -> None:
    """Learn the 1,797 handwritten digits of data/digits.npz, and write new ones to textbook-digits.png."""
    import numpy as np
    from PIL import Image

    training = TrainingConfig(steps=800, batch_size=64, learning_rate=1e-3, warmup_steps=100, ema_decay=0.995)
    unet_config = UNetConfig(1, 8, 8, 32, (1, 2), res_blocks=1, attention_resolutions=(4,), groups=8)
    config = Config(unet=unet_config, diffusion=DiffusionConfig(schedule="cosine", variance="small"), training=training)
    levels = np.load(__file__.replace("textbook.py", "data/digits.npz"))["images"]  # [N, 8, 8] of 0..16
    digits = torch.from_numpy(levels[:, None] * (255 / 16))
    unet = UNet(unet_config)
    ema = copy.deepcopy(unet).eval()
    batches = enumerate(digits[torch.randint(len(digits), (training.batch_size,))] for _ in range(training.steps))
    for step, loss in enumerate(train(unet, ema, batches, config)):
        print(f"\rstep {step + 1} of {training.steps}: loss {loss:.3f}", end="", flush=True)
    x = sample_ddpm(ema, torch.randn(64, 1, 8, 8), ForwardProcess(config.diffusion))
    grid = F.pad((x.clamp(-1, 1) + 1) * 127.5, (1, 1, 1, 1)).view(8, 8, 10, 10).transpose(1, 2).reshape(80, 80).byte()
    Image.fromarray(grid.numpy()).resize((640, 640), Image.Resampling.NEAREST).save("textbook-digits.png")
    print("; new digits: textbook-digits.png")


if __name__ == "__main__":
    main()
