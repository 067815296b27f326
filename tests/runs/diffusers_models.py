"""Small models made by diffusers itself."""

from typing import Any, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
"""A network with all of diffusers' defaults but its size."""
PAPER: dict[str, Any] = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
"""What makes it the paper's, as in google/ddpm-cifar10-32."""


@torch.no_grad()
def perturbed(network: Network) -> Network:
    """Give a network weights that all matter."""
    generator = torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def pipeline(scheduler: Any = None) -> Any:
    """Return a pipeline of the small network."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    kind: Any = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
    made = kind(unet=perturbed(UNet2DModel(**SMALL)), scheduler=scheduler or DDPMScheduler())
    made.set_progress_bar_config(disable=True)
    return made
