"""What `ddpm-fast train` and `check` do once their flags are known."""

import sys
from dataclasses import replace
from pathlib import Path

from ddpm_fast.checks.results import report
from ddpm_fast.checks.suite import check_run, report_kernels
from ddpm_fast.config import CheckConfig, Config, with_training
from ddpm_fast.data.conditions import with_classes
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.data.survey import survey
from ddpm_fast.engine.threads import choose_threads
from ddpm_fast.launch import train_config
from ddpm_fast.options import StartOptions
from ddpm_fast.planning.auto import outlook
from ddpm_fast.presets import AUTO
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.decisions import settle
from ddpm_fast.runs.device import prepare_device, require_precision
from ddpm_fast.runs.directory import where_data_is


def _progress() -> bool:
    return sys.stderr.isatty()


def train(config: Config, start: StartOptions) -> int:
    """Check the mathematics, then train; returns the exit status."""
    if start.dry_run:
        return dry_run(config)
    train_config(config, start, _progress())
    return 0


def dry_run(config: Config) -> int:
    """Say what would be trained, and how long it would take; returns the exit status."""
    device = prepare_device(config.training.device, config.training.precision)
    require_precision(config.training.precision, device)
    if config.preset != AUTO.preset:  # a plan has looked at the images
        print(f"{config.data.data}: {survey(config.data)}")
    decided, _ = settle(config.training, None)
    print("\n".join(outlook(config, decided.device, decided.precision, full=True)))
    return 0


def check(config: Config, run: str) -> int:
    """Check a trained run, or what a configuration describes, in full; returns the exit status."""
    found = checkpoint.resolve(Path(run)) if run else None
    if found is not None:
        asked = config.training
        checks = CheckConfig(found.config.checks.accept + config.checks.accept, config.checks.strict)
        saved = where_data_is(checkpoint.run_of(found.path), found.config)
        config = replace(with_training(saved, device=asked.device, kernels=asked.kernels), checks=checks)
    device = prepare_device(config.training.device, config.training.precision)
    if device.type == "cpu":
        choose_threads()
    dataset = open_dataset(config.data, config.unet, progress=_progress())
    config = with_classes(config, dataset)
    results = check_run(config, dataset, device, found, full=True)
    return report(results, full=True, strict=config.checks.strict) or report_kernels(config, device)
