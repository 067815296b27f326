"""What is said before a run: its plan as a line of flags, its time here, and whether its preset fits the images."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ddpm_fast.config import Config, DataConfig, UNetConfig
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.data.survey import Facts, survey
from ddpm_fast.engine.execution import choose_dtype
from ddpm_fast.engine.speed import Machine, measured_speed, this_machine
from ddpm_fast.flags import command_line
from ddpm_fast.options import Wanted
from ddpm_fast.planning.cost import flop_per_image, seconds
from ddpm_fast.planning.plan import PLANNED, plan, remarks
from ddpm_fast.presets import AUTO, PRESETS
from ddpm_fast.progress import duration
from ddpm_fast.runs.device import prepare_device

Kind = Literal["cpu", "cuda"]
LONG_SECONDS = 3 * 3600.0
"""A preset's run that is expected to take longer says so before it starts."""
QUICK_FLOP = 1e14
"""A run of fewer takes hours nowhere: nothing is measured for it."""
FAR_SMALLER = 2
"""Times as high and wide as a preset makes them: images of which much is lost."""


def planned(data: DataConfig, wanted: Wanted, minutes: float, progress: bool = False) -> Config:
    """Look at the images and the machine, say what is found, and plan a run.

    Raises:
        InputError: the images cannot be used, or what is wanted does not fit together.
    """
    device = prepare_device(wanted.device, wanted.precision)
    facts = survey(data, progress=progress)
    if not facts.side:
        open_dataset(data, AUTO.unet)  # says what is wrong with each
    print(f"{data.data}: {facts}", flush=True)
    config = plan(facts, this_machine(device, wanted.precision), data, wanted, minutes)
    for remark in remarks(config, facts):
        print(f"  {remark}")
    return config


def line_of(config: Config) -> str:
    """Return a run as a command: pasted, it gives the same configuration on any machine."""
    if config.preset != AUTO.preset:
        return command_line(config, replace(PRESETS[config.preset], preset=""), ())
    named = ("preset", *PLANNED) if config.data.data == "digits" else PLANNED  # else --data alone asks for a plan
    return command_line(config, AUTO, named)


def expected_seconds(config: Config, kind: Kind, precision: str) -> float:
    """Estimate the time of a run's steps on this machine."""
    dtype = choose_dtype(precision, torch.device(kind)) if kind == "cuda" else torch.float32
    return seconds(config, Machine(kind, 0.0, measured_speed(kind, dtype)))


def outlook(config: Config, kind: Kind, precision: str, full: bool = False) -> list[str]:
    """Return what is said before a new run: a plan and its time, or that a preset takes long or fits its images badly.

    Args:
        config: of the run.
        kind: of the device, "cpu" or "cuda".
        precision: of the U-Net's arithmetic.
        full: say of any run what is said of a plan.
    """
    said = [misfit(config.preset, config.unet, survey(config.data))] if _is_own_data(config) else []
    full = full or config.preset == AUTO.preset
    training = config.training
    if full or flop_per_image(config.unet) * training.batch_size * training.steps > QUICK_FLOP:
        expected = expected_seconds(config, kind, precision)
        if full:
            said += [line_of(config), f"  about {duration(expected)} of training here"]
        if config.preset != AUTO.preset and expected > LONG_SECONDS:
            fits = f"--minutes 30 instead of --preset {config.preset} plans one that fits"
            said.append(f"this takes about {duration(expected)} on this machine: {fits}")
    return [line for line in said if line]


def _is_own_data(config: Config) -> bool:
    usual = PRESETS.get(config.preset)
    if usual is None or config.data.data == "digits" or not Path(config.data.data or "?").exists():
        return False  # what lies on the hub is looked at by those who fetch it
    shapes = [(unet.image_channels, unet.height, unet.width) for unet in (usual.unet, config.unet)]
    return shapes[0] == shapes[1]  # another one is the user's own wish


def misfit(preset: str, unet: UNetConfig, facts: Facts) -> str:
    """Say what a preset makes of much larger or coloured images; "" where it keeps them about as they are."""
    made = [f"{unet.width}x{unet.height}"] if facts.side >= FAR_SMALLER * min(unet.height, unet.width) else []
    made += ["grey"] if unet.image_channels == 1 and not facts.grey else []
    if not made:
        return ""
    return (
        f"{facts}: --preset {preset} makes them {' and '.join(made)}; --preset auto plans by the images (try --dry-run)"
    )
