"""denoising-diffusion-pytorch's training step and sampling loop.

Its U-Net is another network than the paper's: two ResBlocks per level on either way, linear attention but at the lowest
level, RMS norms. Imported late: torchvision, which it needs, does not import beside every build of torch.
Shapes: N images, C channels, H x W pixels, K steps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bench.timing.clock import Work
from ddpm_fast.config import Config


def diffusion(config: Config) -> nn.Module:
    """Build its GaussianDiffusion around its own U-Net of the configuration's widths."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # pyright: ignore[reportMissingImports]

    unet = config.unet
    model = Unet(
        dim=unet.channels, dim_mults=unet.channel_multipliers, channels=unet.image_channels, dropout=unet.dropout
    )
    size = (unet.height, unet.width)
    return GaussianDiffusion(model, image_size=size, objective="pred_noise", beta_schedule="linear")


def train_step(config: Config, n: int, device: torch.device) -> Work:
    """Build the step of its Trainer, on images that lie on the device."""
    model = diffusion(config).to(device).train()
    from ema_pytorch import EMA  # pyright: ignore[reportMissingImports]

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(model, beta=0.995, update_every=10)
    images = torch.rand(n, config.unet.image_channels, config.unet.height, config.unet.width, device=device)

    def step() -> float:
        loss = model(images)
        value = loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return value

    return step


def sampling(config: Config, n: int, steps: int, device: torch.device) -> Work:
    """Build the first K steps of its p_sample_loop: asked for fewer than T it would choose another sampler."""
    model: Any = diffusion(config).to(device).eval()
    shape = (n, config.unet.image_channels, config.unet.height, config.unet.width)

    def loop() -> Tensor:
        x = torch.randn(shape, device=device)
        for t in reversed(range(model.num_timesteps - steps, model.num_timesteps)):
            x, _ = model.p_sample(x, t)
        return model.unnormalize(x).cpu()

    return loop
