"""What a run's flags change: a preset's configuration, a plan's, another model's network, or a run's own."""

import dataclasses
from pathlib import Path

from ddpm_fast.config import Config, DataConfig
from ddpm_fast.errors import require
from ddpm_fast.flags import field_names
from ddpm_fast.options import StartOptions, Wanted
from ddpm_fast.planning import auto, fitting
from ddpm_fast.presets import AUTO, plans
from ddpm_fast.presets import preset as find_preset
from ddpm_fast.runs.compare import open_run
from ddpm_fast.runs.directory import holds_run, read_config, recorded, where_data_is
from ddpm_fast.runs.initial import with_network_of


def starting_config(
    preset: str | None,
    start: StartOptions,
    data: DataConfig | None = None,
    wanted: Wanted | None = None,
    init: str = "",
) -> Config:
    """Return what flags change: a preset, a plan, or the run's own that is continued or judged against.

    Args:
        preset: the name that was given, if any.
        start: where to start.
        data: that is given.
        wanted: what of a plan is fixed.
        init: the model, if any, whose U-Net and process are taken.

    Raises:
        InputError: there is no such preset or run, nothing to resume was named, or nothing can be planned.
    """
    require(not (start.against and preset), f"--preset {preset} and --against {start.against}: leave one of them out")
    if resumes(start):
        run = Path(start.out)
        config, _ = recorded(run)
        if read_config(run) is None:
            print(f"{run / 'config.json'} is missing or torn: it is written anew, as the newest checkpoint has it")
        return dataclasses.replace(where_data_is(run, config), preset=preset or config.preset)
    data, wanted = data or DataConfig(), wanted or Wanted()
    if start.against:
        config = open_run(Path(start.against)).config
    elif plans(preset, data.data, start.minutes):
        config = auto.planned(data, _for_network(init, wanted) if init else wanted, start.minutes)
    else:
        config = find_preset(preset or "digits")
    return with_network_of(init, config) if init else config


def _for_network(init: str, wanted: Wanted) -> Wanted:
    """Return what a plan must keep to where the U-Net is another model's."""
    unet = vars(with_network_of(init, AUTO).unet)
    return dataclasses.replace(wanted, **{name: unet[name] for name in field_names(Wanted) if name in unet})


def with_auto_batch(config: Config, start: StartOptions) -> Config:
    """Settle --batch-size auto: a plan has a number, as has a run that is continued or judged against."""
    known = "the run" if resumes(start) or start.against else "the plan" if config.preset == AUTO.preset else ""
    if known:
        print(f"--batch-size auto: {config.training.batch_size}, as {known} has it", flush=True)
    return config if known else fitting.with_fitting_batch(config)


def resumes(start: StartOptions) -> bool:
    """Return whether a run is to be continued."""
    if start.resume or start.resume_or_start:
        name = "--resume" if start.resume else "--resume-or-start"
        require(start.out != "", f"{name} needs --out: name the run directory to continue")
    return start.resume or (start.resume_or_start and holds_run(Path(start.out)))
