"""What `ddpm-fast sample` does once its flags are known: images are written as they are made."""

import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_fast.cli.arguments import SampleArguments
from ddpm_fast.cli.listing import run_meant
from ddpm_fast.engine.threads import choose_threads
from ddpm_fast.files import require_writable
from ddpm_fast.runs import checkpoint, origin
from ddpm_fast.runs.grids import save_animation, to_uint8
from ddpm_fast.runs.samples import GRID_IMAGES, Samples, default_directory, kind_of, require_same_kind
from ddpm_fast.runs.signals import InterruptedRunError
from ddpm_fast.runs.trained_model import Model

ANIMATION_FRAMES = 60
ANIMATED_IMAGES = 16


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
    """Make those of a checkpoint's images that are not there yet; returns the exit status."""
    started = time.perf_counter()
    model = Model(run_meant(arguments.run), arguments)
    if model.device.type == "cpu":
        choose_threads()
    samples = _open(model, arguments)
    _say_if_code_changed(model.path)
    try:
        execution = _make(model, samples, arguments)
        seconds = round(time.perf_counter() - started, 3)
        samples.finish(_facts(model, seconds), sys.stderr.isatty())
    except InterruptedRunError as interrupted:
        if not samples.directory.exists():
            raise
        missing = f"{samples.missing} of {arguments.count} images are missing" if samples.missing else "not complete"
        said = f"interrupted; {samples.directory}: {missing}; the same command goes on"
        raise InterruptedRunError(interrupted.number, said) from None
    there = f" ({samples.found} of them were there)" if samples.found else ""
    grid = f"grid.png shows {'them all' if len(samples.there) <= GRID_IMAGES else f'the first {GRID_IMAGES}'}"
    how = f"{model.device}, {samples.kind['precision']}, {execution}"
    print(f"{arguments.count} images{there} in {seconds:.1f} s on {how}: {samples.directory} ({grid})")
    return 0


def _open(model: Model, arguments: SampleArguments) -> Samples:
    """Return the directory to write to, or to go on in.

    Raises:
        InputError: it holds samples of another kind, or is not ours to write to.
    """
    kind = kind_of(model, arguments, arguments.format)
    directory = Path(arguments.out) if arguments.out else default_directory(model, arguments, kind)
    require_writable(directory)
    require_same_kind(directory, kind)
    return Samples(directory, kind, arguments)


def _make(model: Model, samples: Samples, arguments: SampleArguments) -> str:
    """Make what is missing, and the animation where one is asked for; return how in a word."""
    frames = Frames(arguments.sampler_for(model.config).steps) if arguments.animate else None
    done = samples.there - {arguments.first_index} if frames else samples.there  # its batch is made, for the frames
    for first, x in model.batches(arguments, sys.stderr.isatty(), frames.keep if frames else None, done):
        samples.add(first, to_uint8(x))
    if frames:
        save_animation(samples.directory / "animation.gif", [to_uint8(frame) for frame in frames.kept])
    assert model.loop is not None
    return str(model.loop.execution)


def _say_if_code_changed(path: Path) -> None:
    run = checkpoint.run_of(path)
    changed = origin.changed_since(run)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        names = ", ".join(f"ddpm_fast/{name}" for name in changed[:3])
        print(f"{run} was made by other code ({names}{more} changed since): images may differ", file=sys.stderr)


def _facts(model: Model, seconds: float) -> dict[str, Any]:
    """Return what samples.json says beside the images' kind."""
    assert model.loop is not None
    return {
        "checkpoint": str(model.path),
        "device": str(model.device),
        "execution": str(model.loop.execution),
        "graph_megabytes": round(model.loop.graph_bytes / 1e6, 1),
        "seconds": seconds,
    }
