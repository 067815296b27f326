"""diffusers' training step and sampling loop, as shipped and as an expert would tune them.

What would only slow them down here is left out: images lie on the device already, and no Accelerator wraps the model.
Shapes: N images, C channels, H x W pixels, K steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.timing.clock import Work
from ddpm_fast.config import Config, UNetConfig


@dataclass(frozen=True)
class Tuning:
    """What is turned on around diffusers' own model; the defaults are what it ships."""

    channels_last: bool = False
    half: bool = False
    """bfloat16: autocast in training, weights in sampling."""
    compile_mode: str = ""
    """torch.compile's mode; empty is eager."""
    fused: bool = False
    """AdamW and EMA over all tensors at once, and no loss read back every step."""


def unet(config: UNetConfig) -> nn.Module:
    """Build UNet2DModel as google/ddpm-cifar10-32 configures it, the paper's U-Net weight for weight; or its own."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    levels = range(len(config.channel_multipliers))
    attends = [(config.height >> level) in config.attention_resolutions for level in levels]
    papers = {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "norm_eps": 1e-6}
    return UNet2DModel(
        **(papers if config.details == "paper" else {}),  # pyright: ignore[reportArgumentType]
        sample_size=(config.height, config.width),
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        block_out_channels=tuple(config.channels * m for m in config.channel_multipliers),
        layers_per_block=config.res_blocks,
        dropout=config.dropout,
        attention_head_dim=config.head_channels or None,  # pyright: ignore[reportArgumentType]
        norm_num_groups=config.groups,
        num_class_embeds=config.classes + 1 if config.classes else None,
    )


def noise_scheduler(config: Config) -> Any:
    """Build DDPMScheduler with the configuration's forward process, prediction and variance."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    diffusion = config.diffusion
    settings: dict[str, Any] = {
        "num_train_timesteps": diffusion.timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(diffusion.schedule, diffusion.schedule),
        "variance_type": f"fixed_{diffusion.variance}",
        "clip_sample": diffusion.clip,
        "prediction_type": {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[diffusion.prediction],
    }
    return DDPMScheduler(**settings)


def _prepared(config: UNetConfig, device: torch.device, tuning: Tuning) -> nn.Module:
    model = unet(config).to(device)
    if tuning.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if tuning.compile_mode:
        model.compile(mode=tuning.compile_mode, dynamic=False)
    return model


def train_step(config: Config, n: int, device: torch.device, tuning: Tuning) -> Work:
    """Build the step of diffusers' examples/unconditional_image_generation, with the EMA that it offers."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    model = _prepared(config.unet, device, tuning).train()
    scheduler = noise_scheduler(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=tuning.fused or None
    )
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, foreach=tuning.fused)
    shape = (n, config.unet.image_channels, config.unet.height, config.unet.width)
    images = torch.rand(shape, device=device) * 2 - 1  # as its data loader hands them over
    if tuning.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def step() -> object:
        noise = torch.randn_like(images)
        t = torch.randint(0, config.diffusion.timesteps, (n,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=tuning.half):
            prediction = model(scheduler.add_noise(images, noise, t), t).sample
            loss = F.mse_loss(prediction.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return None if tuning.fused else loss.detach().item()  # its progress bar shows the loss of every step

    return step


def pipeline(config: Config, n: int, steps: int, device: torch.device, tuning: Tuning) -> Work:
    """Build DDPMPipeline's call."""
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    model: Any = _prepared(config.unet, device, tuning).eval()
    ddpm = DDPMPipeline(unet=model, scheduler=noise_scheduler(config))
    ddpm.set_progress_bar_config(disable=True)
    return lambda: ddpm(batch_size=n, num_inference_steps=steps, output_type="np")


def tuned_loop(config: Config, n: int, steps: int, device: torch.device, tuning: Tuning) -> Work:
    """Build DDPMPipeline's loop with the timesteps on the device: one on the host keeps CUDA graphs away."""
    dtype = torch.bfloat16 if tuning.half else torch.float32
    model = _prepared(config.unet, device, tuning).eval()
    if tuning.half:
        model = model.to(dtype)
    scheduler = noise_scheduler(config)
    scheduler.set_timesteps(steps)
    numbers = scheduler.timesteps.tolist()
    on_device = scheduler.timesteps.to(device)[:, None].expand(-1, n).contiguous()
    shape = (n, config.unet.image_channels, config.unet.height, config.unet.width)

    @torch.no_grad()
    def loop() -> Tensor:
        x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for number, t in zip(numbers, on_device, strict=True):
            x = scheduler.step(model(x, t).sample, number, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1).float().cpu()

    return loop
