"""A diffusers pipeline on our sampling loop: called as it is, and its images are made by addressed noise.

diffusers itself is not imported: anything with a UNet2DModel's `unet` and a scheduler's `scheduler` will do.
Shapes: N images, C channels, H x W pixels.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.config import SamplerConfig
from ddpm_fast.diffusion.convert import process_and_sampler
from ddpm_fast.diffusion.noise import NoiseAddress
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import choose_execution
from ddpm_fast.engine.sampling import SamplingLoop
from ddpm_fast.errors import InputError, MathematicsError, require
from ddpm_fast.model.convert import new_names, unet_config
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import choose_ops
from ddpm_fast.runs.grids import Images, to_uint8

WORDS = 2**32
DTYPES = (torch.float32, torch.bfloat16)
HONOURED = ("batch_size", "generator", "num_inference_steps", "eta", "output_type", "return_dict")
"""Arguments of pipelines that are honoured; others must have their defaults."""


class PipelineOutput(NamedTuple):
    """What a pipeline returns."""

    images: Any
    """A list of Pillow images; or black to white as 0 to 1: [N, H, W, C] for NumPy, [N, C, H, W] for PyTorch."""


class AcceleratedPipeline:
    """A pipeline's U-Net and scheduler on our loop, with the pipeline's own signature."""

    def __init__(self, pipeline: Any) -> None:
        """Take over a pipeline; see `ddpm_fast.accelerate`."""
        unet, scheduler = pipeline.unet, pipeline.scheduler
        weight = next(unet.parameters())
        require(weight.dtype in DTYPES, f"the pipeline's U-Net is {weight.dtype}: make it torch.float32 or bfloat16")
        rows = dict(unet.config).get("num_class_embeds")
        message = (
            f"pipeline.unet.config: num_class_embeds is {rows}, but a pipeline passes its U-Net no labels: save it"
        )
        require(
            rows is None, f"{message} by save_pretrained, and make images by ddpm_fast.load(FOLDER).sample(label=0)"
        )
        told = {**dict(scheduler.config), "_class_name": type(scheduler).__name__}
        self.diffusion, self.sampling = process_and_sampler(told, "pipeline.scheduler.config")
        with torch.device("meta"):
            self.unet = UNet(unet_config(dict(unet.config), "pipeline.unet.config"))
        try:
            weights = {name: tensor.clone() for name, tensor in new_names(unet.state_dict()).items()}
            self.unet.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise InputError(f"the pipeline's U-Net does not fit its config: {str(error).splitlines()[-1]}") from None
        self.device, self.dtype = weight.device, weight.dtype
        self.unet.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.unet.use(choose_ops(True, self.device))
        self.__signature__ = inspect.signature(pipeline.__call__)
        self._loop: tuple[SamplerConfig, SamplingLoop] | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Make images, as the pipeline does; what was compiled and captured is kept for the next call.

        Returns:
            A `PipelineOutput`, or without return_dict a tuple of its images.

        Raises:
            InputError: an argument cannot be honoured.
            MathematicsError: a value is not finite.
        """
        bound = self.__signature__.bind(*arguments, **keywords)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            default = self.__signature__.parameters[name].default
            require(name in HONOURED or value in (default, False), f"{name} is {value!r}: it cannot be honoured here")
        asked = bound.arguments
        x = self._sample(asked["batch_size"], asked["generator"], asked["num_inference_steps"], asked.get("eta", 0.0))
        if asked["output_type"] == "pil":
            images: Any = Images(to_uint8(x))
        else:
            images = (x / 2 + 0.5).clamp(0, 1)
            images = images if asked["output_type"] == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
        return PipelineOutput(images) if asked["return_dict"] else (images,)

    def _sample(self, count: int, generator: Any, steps: int, eta: float) -> Tensor:
        sampler, total = replace(self.sampling, steps=steps, eta=eta), self.diffusion.timesteps
        skips = sampler.sampler == "ddim" and sampler.spacing == "trailing" and total % steps != 0
        message = f"num_inference_steps is {steps}: with trailing timesteps DDIMScheduler then skips to others than it "
        require(not skips, f"{message}visits; take a number that divides {total}")
        if self._loop is None or self._loop[0] != sampler:
            flop = float(self.unet.estimate_flop()) * steps * count
            self._loop = None  # free the old one first
            table, execution = sampler_table(self.diffusion, sampler), choose_execution(True, True, self.device, flop)
            self._loop = sampler, SamplingLoop(self.unet, table, self.dtype, execution)
        x = self._loop[1].run(noise_address(count, generator, self.device))
        if not torch.isfinite(x).all():
            raise MathematicsError("a sampled value is not finite: the weights are broken, or bfloat16 overflowed")
        return x


def noise_address(
    count: int, generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
) -> NoiseAddress:
    """Return whose noise `count` images are made of: generators choose the address, so that their seeds decide.

    Args:
        count: N.
        generator: draws the seed, PyTorch's own if None; or one for each image, which then follows from it alone.
        device: where the address is needed.
    """
    if isinstance(generator, Sequence):
        require(len(generator) == count, f"generator is a list of {len(generator)} for a batch_size of {count}")
        number = torch.cat([_words(1, one) for one in generator])
        return NoiseAddress(torch.zeros(2, dtype=torch.int64, device=device), number.to(device))
    return NoiseAddress(_words(2, generator).to(device), torch.arange(count, device=device))


def _words(count: int, generator: torch.Generator | None) -> Tensor:
    where = generator.device if generator is not None else None
    return torch.randint(WORDS, (count,), generator=generator, device=where).cpu()
