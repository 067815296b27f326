"""Fine-tuning: a run that starts at step 0 with another model's averaged weights, its raw weights and average alike."""

from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from ddpm_fast.config import Config
from ddpm_fast.errors import flag, require
from ddpm_fast.model.unet import UNet
from ddpm_fast.runs import diffusers_folder
from ddpm_fast.runs.checkpoint import Checkpoint
from ddpm_fast.runs.trained_model import unet_of

MAY_DIFFER = ("dropout", "variance", "clip")
"""Flags of the U-Net and the process that change nothing about what the weights mean."""


def _source(init: str) -> Checkpoint:
    return diffusers_folder.resolve(Path(init), ("ema",))


def with_network_of(init: str, config: Config) -> Config:
    """Return a configuration with the U-Net, the process and the sampler of the model that --init names.

    Raises:
        InputError: it is missing, damaged, or cannot be honoured.
    """
    found = _source(init).config
    training = replace(config.training, init=init)
    return replace(config, unet=found.unet, diffusion=found.diffusion, sampling=found.sampling, training=training)


def initial_weights(config: Config) -> dict[str, Tensor]:
    """Return the weights that --init names, by their names.

    Raises:
        InputError: they are missing or damaged, or of another U-Net or process than the run's.
    """
    init, found = config.training.init, _source(config.training.init)
    for own, theirs in ((config.unet, found.config.unet), (config.diffusion, found.config.diffusion)):
        expected = asdict(theirs)
        for name, value in asdict(own).items():
            same = value == expected[name] or name in MAY_DIFFER
            message = f"{flag(name)} is {value}: the weights of --init {init} are of {flag(name)} {expected[name]}"
            require(same, f"{message}; leave the flag out")
    unet: UNet = unet_of(found, "ema")
    return dict(unet.state_dict())
