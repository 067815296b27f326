"""Curves as inline SVG, for pages that need no other file.

Everything drawn here is text: a page of them opens anywhere and stays sharp.
"""

import math
from dataclasses import dataclass, field, replace

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 28, 40
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
"""One for each run, in the order in which they were named."""


@dataclass(frozen=True)
class Curve:
    """A line through points."""

    label: str
    points: list[tuple[float, float]]
    spread: list[float] = field(default_factory=list)
    """Half the length of each point's error bar, where there are any."""
    colour: str = COLOURS[0]


class Axis:
    """Where values lie on one side of a plot."""

    def __init__(self, values: list[float], start: float, end: float, logarithmic: bool) -> None:
        """Take the values to show, and the pixels at which the least and the largest lie."""
        self.logarithmic = logarithmic
        scaled = [self._scaled(value) for value in values]
        self.low, self.high = min(scaled), max(scaled)
        if self.high - self.low < 1e-12:
            self.low, self.high = self.low - 1, self.high + 1
        self.start, self.end = start, end

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values between the ends, a handful."""
        if self.logarithmic:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            steps = (1, 2, 5) if self.high - self.low < 3 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
            return [value for value in values if self.low <= math.log10(value) <= self.high]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def line_plot(title: str, curves: list[Curve], x_label: str, logarithmic_y: bool = False) -> Markup:
    """Draw curves over a logarithmic x axis, with error bars where they have any; nothing if there is no point."""
    drawn = [finite for curve in curves if (finite := _finite(curve)).points]
    if not drawn:
        return Markup("")
    ends = [
        value + sign * spread
        for curve in drawn
        for (_, value), spread in zip(curve.points, curve.spread, strict=True)
        for sign in (-1, 1)
    ]
    x = Axis([at for curve in drawn for at, _ in curve.points], LEFT, WIDTH - RIGHT, logarithmic=True)
    y = Axis(ends if logarithmic_y else [0.0, *ends], HEIGHT - BOTTOM, TOP, logarithmic_y)
    parts = [f'<text x="{LEFT}" y="16" class="title">{escape(title)}</text>']
    parts += [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
        for tick in y.ticks()
    ]
    parts += [
        f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:.6g}</text>'
        for tick in x.ticks()
    ]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
    for curve in drawn:
        parts += _curve(curve, x, y)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>')


def _finite(curve: Curve) -> Curve:
    """Return the curve without the points that cannot be drawn."""
    spread = curve.spread or [0.0] * len(curve.points)
    kept = [(point, each) for point, each in zip(curve.points, spread, strict=True) if math.isfinite(point[1] + each)]
    return replace(curve, points=[point for point, _ in kept], spread=[each for _, each in kept])


def _curve(curve: Curve, x: Axis, y: Axis) -> list[str]:
    path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in curve.points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.5"/>']
    for (at, value), spread in zip(curve.points, curve.spread, strict=True):
        said = escape(f"{curve.label}, {at:g}: {value:.4g}" + (f" +- {spread:.2g}" if spread else ""))
        if spread:
            bar = f'x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{y(value - spread):.1f}" y2="{y(value + spread):.1f}"'
            parts.append(f'<line {bar} stroke="{curve.colour}"/>')
        parts.append(
            f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="2.5" fill="{curve.colour}"><title>{said}</title></circle>'
        )
    return parts
