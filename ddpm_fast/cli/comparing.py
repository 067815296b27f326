"""What `ddpm-fast compare` does once its flags are known."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddpm_fast.cli.arguments import CompareArguments
from ddpm_fast.errors import InputError, MathematicsError
from ddpm_fast.files import require_writable
from ddpm_fast.options import LoadOptions, SamplingOptions
from ddpm_fast.runs.compare import LOSS_IS_NOT_QUALITY, RecordedRun, open_run, table, what_differs
from ddpm_fast.runs.grids import grid, to_uint8
from ddpm_fast.runs.page import Picture, of_other_steps, write_comparison
from ddpm_fast.runs.scores import side_by_side
from ddpm_fast.runs.trained_model import Model

SAMPLER = SamplingOptions("dpm++", 20)
"""What draws the pictures: few steps, and the same first noise in every run."""


def compare(arguments: CompareArguments) -> int:
    """Compare runs with the first of them; returns the exit status."""
    base, *others = [open_run(Path(run)) for run in arguments.runs]
    page = Path(arguments.out) if arguments.out else None
    if page is not None:
        require_writable(page.parent)
    print(f"the base: {_shown(base)}")
    for other in others:
        print(f"\n{_shown(other)}\n  what differs")
        print("\n".join(f"    {line}" for line in what_differs(base, other)))
        print("  evaluation loss of the averaged weights, less the base's, at the same addresses")
        print("\n".join(f"  {line}" for line in [*table(base, other), *side_by_side(base, other)]))
    print(f"\n{LOSS_IS_NOT_QUALITY}" + ("" if page else ": --out page.html shows the same images of each run") + ".")
    if page is not None:
        write_page(page, base, others, arguments.images)
    return 0


def write_page(page: Path, base: RecordedRun, others: Sequence[RecordedRun], images: int) -> None:
    """Write a comparison's page, with so many images of each run."""
    runs = [base, *others]
    steps = min(SAMPLER.steps, *(run.config.diffusion.timesteps for run in runs))
    pictures = _pictures(runs, replace(SAMPLER, steps=steps, count=images)) if images else {}
    caption = f"Images 0 to {images - 1} of seed 0, averaged weights, {SAMPLER.sampler} in {steps} steps."
    write_comparison(page, base, others, pictures, caption)
    if warning := of_other_steps(pictures):
        print(f"{warning}: " + ", ".join(f"{run} at step {picture.step:,}" for run, picture in pictures.items()))
    print(f"the page: {page}")


def _shown(run: RecordedRun) -> str:
    rate = run.images_per_s
    steps = f"evaluated up to step {run.evaluated_steps[-1]:,}" if run.evaluated_steps else "never evaluated"
    return f"{run.path}, {steps}" + (f", {rate:,.0f} images/s" if rate else "")


def _pictures(runs: Sequence[RecordedRun], wanted: SamplingOptions) -> dict[Path, Picture]:
    """Draw the same image numbers of each run that has a checkpoint."""
    pictures: dict[Path, Picture] = {}
    for run in runs:
        try:
            model = Model(run.path, LoadOptions())
            image = grid(to_uint8(model.draw(wanted, progress=sys.stderr.isatty())))
            pictures[run.path] = Picture(image, model.step)
        except (InputError, MathematicsError) as error:
            print(f"no picture of {run.path}: {error}", file=sys.stderr)
    return pictures
