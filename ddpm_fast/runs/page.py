"""A comparison of runs as one HTML file that needs nothing else: text, curves as SVG, pictures as data.

The template, `page.html`, is made of parts that other pages can share; Jinja2 escapes what it is given.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from PIL import Image

from ddpm_fast.files import replace_file
from ddpm_fast.runs.compare import (
    LOSS_IS_NOT_QUALITY,
    Difference,
    RecordedRun,
    changed_code,
    differences,
    not_paired,
    what_differs,
)
from ddpm_fast.runs.plots import COLOURS, Curve, line_plot

TEMPLATE = Path(__file__).with_name("page.html")


class Picture(NamedTuple):
    """What a run draws."""

    image: Image.Image
    """A grid of samples."""
    step: int
    """Of the checkpoint that drew it."""


def of_other_steps(pictures: Mapping[Path, Picture]) -> str:
    """Say that the pictures are of runs after different numbers of steps; "" where they are not."""
    if len({picture.step for picture in pictures.values()}) < 2:
        return ""
    return "The pictures are of each run's newest checkpoint, at different steps, and may differ by that alone"


def write_comparison(
    path: Path, base: RecordedRun, others: Sequence[RecordedRun], pictures: Mapping[Path, Picture], caption: str
) -> None:
    """Write the page that compares runs with a base.

    Args:
        path: of the page.
        base: what the others are compared with.
        others: at least one.
        pictures: by run, of the same image numbers; empty for none.
        caption: how the pictures were made.

    Raises:
        InputError: the page cannot be written.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    runs = [base, *others]
    colours = {run.path: COLOURS[number % len(COLOURS)] for number, run in enumerate(runs)}
    paired = {run.path: [] if not_paired(base, run) else differences(base, run) for run in others}
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=f"{' and '.join(str(run.path) for run in others)} against {base.path}",
        caution=LOSS_IS_NOT_QUALITY,
        base=str(base.path),
        runs=[_summary(run, colours[run.path]) for run in runs],
        others=[_other(base, run, colours[run.path], paired[run.path]) for run in others],
        curves=line_plot("evaluation loss", [_curve(run, colours[run.path]) for run in runs], "step", True),
        differences=_differences(paired, colours),
        pictures=[{"name": f"{run}, step {drawn.step:,}", "png": _png(drawn.image)} for run, drawn in pictures.items()],
        pictures_caption=caption,
        pictures_warning=of_other_steps(pictures),
    )
    replace_file(path, page.encode(errors="replace"))


def _summary(run: RecordedRun, colour: str) -> dict[str, Any]:
    steps, rate = run.evaluated_steps, run.images_per_s
    evaluated = run.evaluated(steps[-1]) if steps else None
    loss = "none" if evaluated is None else f"{float(evaluated.errors['ema'].mean()):.5f} at step {steps[-1]:,}"
    range_of_steps = f"{steps[0]:,} to {steps[-1]:,}" if steps else "none"
    cells = [range_of_steps, loss, "unknown" if rate is None else f"{rate:,.0f}"]
    return {"name": str(run.path), "colour": colour, "cells": cells}


def _other(base: RecordedRun, run: RecordedRun, colour: str, found: list[Difference]) -> dict[str, Any]:
    return {
        "name": str(run.path),
        "colour": colour,
        "what_differs": what_differs(base, run),
        "code": changed_code(base, run),
        "table": [_row(one) for one in found],
        "not_paired": not_paired(base, run) or "no step was evaluated in both",
    }


def _row(one: Difference) -> list[str]:
    means = [f"{one.step:,}", f"{one.base:.5f}", f"{one.other:.5f}", f"{one.mean / one.base:+.2%}"]
    return [*means, f"{one.sigmas:+.1f}", *(f"{value:+.1%}" for value in one.relative_bands)]


def _curve(run: RecordedRun, colour: str) -> Curve:
    evaluated = {step: run.evaluated(step) for step in run.evaluated_steps}
    points = [(float(step), float(found.errors["ema"].mean())) for step, found in evaluated.items() if found]
    return Curve(str(run.path), points, colour=colour)


def _differences(paired: Mapping[Path, list[Difference]], colours: Mapping[Path, str]) -> Markup:
    curves = [
        Curve(
            str(path),
            [(float(one.step), 100 * one.mean / one.base) for one in found],
            [100 * one.standard_error / one.base for one in found],
            colours[path],
        )
        for path, found in paired.items()
    ]
    return line_plot("difference from the first run, in percent of its loss", curves, "step")


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()
