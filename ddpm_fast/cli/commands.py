"""What `ddpm-fast train`, `sample` and `check` do once their flags are known."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ddpm_fast.checks.mathematics import check_run, check_start, report, report_kernels
from ddpm_fast.cli.arguments import SampleArguments
from ddpm_fast.config import Config, InputError, Precision, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import (
    choose_device,
    choose_dtype,
    choose_execution,
    choose_tf32,
    keep_freed_memory,
)
from ddpm_fast.engine.sampling import ImageRange, Loop
from ddpm_fast.engine.sampling import sample as sample_images
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import choose_ops
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.grids import grid, save_animation, save_image, to_uint8
from ddpm_fast.runs.run import InterruptedRunError, Run, find_start

ANIMATION_FRAMES = 60
ANIMATED_IMAGES = 16


def _progress() -> bool:
    return sys.stderr.isatty()


def _prepare_device(name: str, precision: Precision) -> torch.device:
    """Return the device, set to compute in that precision, or refuse one that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no NVIDIA GPU that this PyTorch can use; leave the flag out")
    choose_tf32(precision)
    keep_freed_memory()
    return choose_device(name)


def _next_free(parent: Path, name: str) -> Path:
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


@contextmanager
def _enough_memory(device: torch.device, batch_size: int) -> Iterator[None]:
    """Turn running out of a GPU's memory into one line, and give back what was taken."""
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise InputError(
            f"{device} has too little memory for --batch-size {batch_size}: take a smaller one, or --precision bf16"
        ) from None


def train(config: Config, out: str, resume: bool) -> int:
    """Check the mathematics, then train; returns the exit status."""
    device = _prepare_device(config.training.device, config.training.precision)
    directory = Path(out) if out else _next_free(Path("runs"), config.preset)
    dataset = open_dataset(config.data, config.unet, progress=_progress())
    if dataset.skipped:
        print(f"left out {len(dataset.skipped)} files that cannot be read (--skip-bad)")
    found = find_start(directory, config, dataset.fingerprint, resume)
    step = found.step if found else 0
    if step >= config.training.steps:
        print(f"{directory} is finished: all {step} steps are done; raise --steps to go on")
        return 0
    if resume:
        print(f"{directory}: " + (f"continuing at step {step}" if found else "no checkpoint, starting at step 0"))
    batch_size = config.training.batch_size // config.training.accumulate
    with _enough_memory(device, batch_size):
        status = report(check_start(config, dataset, device))
        if status:
            return status
        run = Run(directory, config, dataset, found, _progress())
    how = f"{device.type}, {str(run.trainer.dtype).removeprefix('torch.')}, {run.trainer.execution}"
    print(f"training {directory} on {how}: {config.training.steps} steps, {len(dataset)} images", flush=True)
    started = time.perf_counter()
    try:
        with _enough_memory(device, batch_size):
            run.train()
    except InterruptedRunError as interrupted:
        print(f"ddpm-fast: {interrupted}", file=sys.stderr)
        return interrupted.exit_status
    print(f"trained in {time.perf_counter() - started:.1f} s; grids in {directory / 'samples'}")
    return 0


def load_unet(found: checkpoint.Checkpoint, weights: str, device: torch.device) -> UNet:
    """Build a checkpoint's U-Net with its "ema" or "raw" weights."""
    with torch.device("meta"):
        unet = UNet(found.config.unet)
    tensors = found.tensors("ema" if weights == "ema" else "model")
    try:
        unet.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise InputError(f"{found.path} does not fit its own configuration: {str(error).splitlines()[-1]}") from None
    unet = unet.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return unet.requires_grad_(False).eval()


def sample(arguments: SampleArguments) -> int:
    """Make images of a checkpoint and write them; returns the exit status."""
    device = _prepare_device(arguments.device, arguments.precision)
    found = checkpoint.resolve(Path(arguments.run))
    try:
        table = sampler_table(found.config.diffusion, arguments.sampler_config())
    except ValueError as error:
        raise InputError(f"--steps or --eta: {error}") from None
    steps = len(table.rows)
    run = found.path.parent.parent if found.path.parent.name == "checkpoints" else found.path
    name = f"{arguments.sampler}-{steps}-seed{arguments.seed}"
    directory = Path(arguments.out) if arguments.out else run / "samples" / name
    with checkpoint.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    unet = load_unet(found, arguments.weights, device).use(choose_ops(arguments.kernels, device))
    images = ImageRange(arguments.seed, arguments.first_index, arguments.count)
    flop = float(unet.estimate_flop()) * steps * images.count
    execution = choose_execution(arguments.compile, arguments.capture, device, flop)
    loop = Loop(unet, table, choose_dtype(arguments.precision, device), execution)
    frames: list[Tensor] = []
    finished = False

    def keep_frame(k: int, x: Tensor) -> None:
        # Of the first batch alone, about ANIMATION_FRAMES steps evenly spread, and the last.
        nonlocal finished
        if not finished and (k * ANIMATION_FRAMES // steps >= len(frames) or k == steps - 1):
            frames.append(x[:ANIMATED_IMAGES].cpu())
        finished |= k == steps - 1

    on_step = keep_frame if arguments.animate else None
    with _enough_memory(device, arguments.batch_size):
        samples = sample_images(loop, images, arguments.batch_size, _progress(), on_step)
    seconds = time.perf_counter() - started
    _write_samples(directory, images, samples)
    if arguments.animate:
        with checkpoint.writing(directory):
            save_animation(directory / "animation.gif", [to_uint8(frame) for frame in frames])
    facts = {
        **{k: v for k, v in asdict(arguments).items() if k in ("seed", "first_index", "count", "sampler", "eta")},
        "steps": steps,
        "spacing": arguments.spacing,
        "weights": arguments.weights,
        "checkpoint": str(found.path),
        "checkpoint_step": found.step,
        "device": str(device),
        "precision": str(loop.dtype).removeprefix("torch."),
        "execution": str(execution),
        "graph_megabytes": round(loop.graph_bytes / 1e6, 1),
        "seconds": round(seconds, 3),
    }
    with checkpoint.writing(directory):
        checkpoint.replace_file(directory / "samples.json", checkpoint.to_json(facts))
    how = f"{device.type}, {facts['precision']}, {execution}"
    print(f"{arguments.count} images in {seconds:.1f} s on {how}: {directory} (grid.png shows them all)")
    return 0


def _write_samples(directory: Path, images: ImageRange, samples: Tensor) -> None:
    pixels = to_uint8(samples)
    for number, image in enumerate(pixels, start=images.first):
        save_image(directory / f"{number:06d}.png", image)
    with checkpoint.writing(directory):
        grid(pixels).save(directory / "grid.png")


def check(config: Config, run: str) -> int:
    """Check a trained run, or what a configuration describes, in full; returns the exit status."""
    found = checkpoint.resolve(Path(run)) if run else None
    if found is not None:
        asked = config.training
        config = with_training(found.config, device=asked.device, kernels=asked.kernels)
    device = _prepare_device(config.training.device, config.training.precision)
    dataset = open_dataset(config.data, config.unet, progress=_progress())
    return report(check_run(config, dataset, device, found), full=True) or report_kernels(config, device)
