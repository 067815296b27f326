"""Everything that is checked, in the order in which a run goes through it; what takes seconds, and what takes more."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from ddpm_fast.checks.as_run import check_as_run
from ddpm_fast.checks.configuration import check_configuration
from ddpm_fast.checks.examples import check_examples
from ddpm_fast.checks.kernels import check_kernels, kernel_table
from ddpm_fast.checks.labels import check_labels
from ddpm_fast.checks.pictures import check_pictures
from ddpm_fast.checks.randomness import check_randomness
from ddpm_fast.checks.results import CheckResult, accepting, judged, naming_errors
from ddpm_fast.checks.sampling import check_loops, check_tables
from ddpm_fast.checks.saved import check_saved
from ddpm_fast.checks.sources import check_sources
from ddpm_fast.checks.stand_in import perturb, small_trainer, steps_to_check
from ddpm_fast.checks.tables import check_schedule
from ddpm_fast.checks.training import check_training
from ddpm_fast.checks.weights import check_weights
from ddpm_fast.config import Config
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.conditions import batches_of
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.engine.execution import EAGER, choose_dtype, choose_execution
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import RULE, choose_ops
from ddpm_fast.runs.checkpoint import Checkpoint


def check_run(
    config: Config, dataset: Dataset, device: torch.device, found: Checkpoint | None = None, full: bool = False
) -> Iterator[CheckResult]:
    """Check what a run would compute, or a trained one computes.

    Args:
        config: the run's; stages that it accepts are at most CHANGED.
        dataset: the run's.
        device: where it computes.
        found: a checkpoint of it.
        full: look at more of everything, and at each kernel in training's batch size.
    """
    yield from accepting(_all(config, dataset, device, found, full), config.checks.accept)


def _all(
    config: Config, dataset: Dataset, device: torch.device, found: Checkpoint | None, full: bool
) -> Iterator[CheckResult]:
    yield from check_configuration(config)
    yield from naming_errors("data", "images are read", check_sources(config, dataset, full))
    yield from naming_errors("order", "examples are read", check_examples(config, dataset, device, full))
    yield from naming_errors("labels", "labels are read", check_labels(config, dataset, device))
    yield from naming_errors("noise", "numbers are drawn", check_randomness(config, device, full))
    source = batches_of(config, dataset, device)
    computed = _check_network(config, source, device, found, full)
    yield from naming_errors("weights", "a U-Net and its trainer are built", computed)
    yield from naming_errors("pixels", "pictures are made", check_pictures(config.unet.image_channels))
    if full:
        yield from naming_errors("checkpoint", "a run is saved and loaded", check_saved(config, device))


def _check_network(
    config: Config, source: BatchSource, device: torch.device, found: Checkpoint | None, full: bool
) -> Iterator[CheckResult]:
    """Check what a run does with its network: training and sampling."""
    trainer = small_trainer(config, source.batch, device)
    yield from check_weights(trainer.unet, replace(config, unet=trainer.config.unet))
    if found is not None:
        yield _check_checkpoint(found)
    yield from naming_errors("schedule", "there is a schedule", check_schedule(config.diffusion, trainer.table))
    yield from naming_errors("network", "training steps are taken", check_training(trainer, config))
    yield from naming_errors("sampler", "samplers are made", check_tables(config.diffusion, full))
    perturb(trainer.unet)
    execution = choose_execution(config.training.compile, config.training.capture, device)
    dtype = choose_dtype(config.training.precision, device)
    loops = check_loops(trainer.unet, config.diffusion, dtype, execution)
    yield from naming_errors("sampler", "images are sampled", loops)
    if full and execution != EAGER:
        late = steps_to_check(config.training)[-1]
        run = Trainer(config, source.batch, device, execution)
        yield from naming_errors("kernels", "steps are taken as in the run", check_as_run(run, late))
    if trainer.unet.ops.fused:
        kernels = check_kernels(trainer.unet.ops, config, device, dtype)
        yield from naming_errors("kernels", "kernels run", kernels)


def _check_checkpoint(found: Checkpoint) -> CheckResult:
    """Check that a checkpoint's weights are finite and those of its U-Net."""
    with torch.device("meta"):
        expected = {name: tuple(parameter.shape) for name, parameter in UNet(found.config.unet).named_parameters()}
    odd = []
    for part in ("model", "ema"):
        weights = found.tensors(part)
        odd += [f"{part}: other tensors"] * (expected != {name: tuple(value.shape) for name, value in weights.items()})
        odd += [f"{part}: {name}" for name, value in weights.items() if not torch.isfinite(value).all()]
    name = f"the weights of {found.path.name} are finite and fit the U-Net"
    return CheckResult("checkpoint", name, judged(not odd), "all", odd[0] if odd else "all", str(found.path))


def report_kernels(config: Config, device: torch.device) -> int:
    """Print which ops run kernels and, where any do, the table of them; return the exit status: 0, or 3."""
    print(f"kernels: {RULE}")
    ops = choose_ops(config.training.kernels, device)
    if not ops.fused:
        print("  none run here: " + (f"the device is {device.type}" if config.training.kernels else "--no-kernels"))
        return 0
    right = True
    for row, within_bound in kernel_table(ops, config, device, choose_dtype(config.training.precision, device)):
        print(f"  {row}" + ("" if within_bound else "  FAIL"), flush=True)
        right &= within_bound
    return 0 if right else 3
