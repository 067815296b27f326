"""What `ddpm-fast train`, `sample` and `check` do once their flags are known."""

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_fast.api import train_config
from ddpm_fast.checks.results import report
from ddpm_fast.checks.suite import check_run, report_kernels
from ddpm_fast.cli.arguments import SampleArguments
from ddpm_fast.config import CheckConfig, Config, SamplerConfig, with_training
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.engine.threads import choose_threads
from ddpm_fast.files import replace_file, require_writable
from ddpm_fast.options import StartOptions
from ddpm_fast.runs import checkpoint, origin
from ddpm_fast.runs.device import prepare_device
from ddpm_fast.runs.grids import grid, save_animation, save_image, save_picture, to_uint8
from ddpm_fast.runs.signals import InterruptedRunError
from ddpm_fast.runs.trained_model import Model

ANIMATION_FRAMES = 60
ANIMATED_IMAGES = 16


def _progress() -> bool:
    return sys.stderr.isatty()


def train(config: Config, start: StartOptions) -> int:
    """Check the mathematics, then train; returns the exit status."""
    train_config(config, start, _progress())
    return 0


class Frames:
    """Keeps what an animation shows: about ANIMATION_FRAMES steps of the first batch, evenly spread, and the last."""

    def __init__(self, steps: int) -> None:
        self.kept: list[Tensor] = []
        self._steps, self._finished = steps, False

    def keep(self, k: int, x: Tensor) -> None:
        """Look at x after step k, as `SamplingLoop.run` calls it."""
        last = k == self._steps - 1
        if not self._finished and (k * ANIMATION_FRAMES // self._steps >= len(self.kept) or last):
            self.kept.append(x[:ANIMATED_IMAGES].to("cpu", copy=True))  # the loop writes on in x
        self._finished |= last


def sample(arguments: SampleArguments) -> int:
    """Make images of a checkpoint and write them; returns the exit status."""
    started = time.perf_counter()
    model = Model(Path(arguments.run), arguments)
    if model.device.type == "cpu":
        choose_threads()
    sampler = arguments.sampler_for(model.config)
    name = f"{sampler.sampler}-{sampler.steps}-seed{arguments.seed}"
    directory = Path(arguments.out or _default_out(model.path, name))
    require_writable(directory)
    _say_if_code_changed(model.path)
    frames = Frames(sampler.steps)
    samples = model.draw(arguments, _progress(), frames.keep if arguments.animate else None)
    facts = _facts(arguments, sampler, model, round(time.perf_counter() - started, 3))
    try:
        _write(directory, arguments.first_index, samples, frames.kept, facts)
    except InterruptedRunError as interrupted:
        raise InterruptedRunError(interrupted.number, f"interrupted; {directory} is not complete") from None
    how = f"{facts['device']}, {facts['precision']}, {facts['execution']}"
    print(f"{arguments.count} images in {facts['seconds']:.1f} s on {how}: {directory} (grid.png shows them all)")
    return 0


def _say_if_code_changed(path: Path) -> None:
    run = checkpoint.run_of(path)
    changed = origin.changed_since(run)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        names = ", ".join(f"ddpm_fast/{name}" for name in changed[:3])
        print(f"{run} was made by other code ({names}{more} changed since): images may differ", file=sys.stderr)


def _write(directory: Path, first: int, samples: Tensor, frames: list[Tensor], facts: dict[str, Any]) -> None:
    pixels = to_uint8(samples)
    for number, image in enumerate(pixels, start=first):
        save_image(directory / f"{number:06d}.png", image)
    save_picture(directory / "grid.png", grid(pixels))
    if frames:
        save_animation(directory / "animation.gif", [to_uint8(frame) for frame in frames])
    replace_file(directory / "samples.json", checkpoint.to_json(facts))


def _default_out(path: Path, name: str) -> Path:
    return checkpoint.run_of(path) / "samples" / name


def _facts(arguments: SampleArguments, sampler: SamplerConfig, model: Model, seconds: float) -> dict[str, Any]:
    """Return what samples.json says."""
    loop = model.loop
    assert loop is not None
    return {
        **{name: getattr(arguments, name) for name in ("seed", "first_index", "count")},
        **asdict(sampler),
        "weights": arguments.weights,
        "checkpoint": str(model.path),
        "checkpoint_step": model.step,
        "device": str(model.device),
        "precision": str(loop.dtype).removeprefix("torch."),
        "execution": str(loop.execution),
        "graph_megabytes": round(loop.graph_bytes / 1e6, 1),
        "seconds": seconds,
    }


def check(config: Config, run: str) -> int:
    """Check a trained run, or what a configuration describes, in full; returns the exit status."""
    found = checkpoint.resolve(Path(run)) if run else None
    if found is not None:
        asked = config.training
        checks = CheckConfig(found.config.checks.accept + config.checks.accept, config.checks.strict)
        config = replace(with_training(found.config, device=asked.device, kernels=asked.kernels), checks=checks)
    device = prepare_device(config.training.device, config.training.precision)
    if device.type == "cpu":
        choose_threads()
    dataset = open_dataset(config.data, config.unet, progress=_progress())
    results = check_run(config, dataset, device, found, full=True)
    return report(results, full=True, strict=config.checks.strict) or report_kernels(config, device)
