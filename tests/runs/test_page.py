"""A comparison as one HTML file, and the curves on it."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ddpm_fast.runs.compare import open_run
from ddpm_fast.runs.grids import grid
from ddpm_fast.runs.page import Picture, of_other_steps, write_comparison
from ddpm_fast.runs.plots import HEIGHT, WIDTH, Axis, Curve, line_plot
from tests.runs.test_compare import recorded

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Tree(HTMLParser):
    """Fails on a tag that is not closed, and gathers what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(tmp_path: Path):
    base, other = open_run(recorded(tmp_path / "a")), open_run(recorded(tmp_path / "b <i>", shift=-1))
    assert other.origin is not None
    other.origin.sources["config.py"] += "# <script>alert(1)</script>\n"
    picture = grid(np.zeros((4, 8, 8, 1), np.uint8))
    path = tmp_path / "page.html"
    pictures = {base.path: Picture(picture, 1200), other.path: Picture(picture, 1200)}
    write_comparison(path, base, [other], pictures, "Images 0 to 3")
    text = path.read_text()
    tree = Tree()
    tree.feed(text)
    assert tree.open == []
    assert len(tree.fetched) == 2
    assert all(source.startswith("data:image/png;base64,") for source in tree.fetched)
    assert "<script" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;" in text
    assert text.count("<svg") == 2
    for said in (str(base.path), "ddpm_fast/config.py (+1 -0 lines)", "Loss is not sample quality", "Images 0 to 3"):
        assert said in text
    assert re.search(r"<td>\d\.\d{5} at step 100</td>", text)
    assert "different steps" not in text


def test_pictures_of_different_steps_say_so(tmp_path: Path):
    base, other = open_run(recorded(tmp_path / "a")), open_run(recorded(tmp_path / "b"))
    picture = grid(np.zeros((4, 8, 8, 1), np.uint8))
    pictures = {base.path: Picture(picture, 1200), other.path: Picture(picture, 200)}
    write_comparison(tmp_path / "page.html", base, [other], pictures, "Images 0 to 3")
    text = (tmp_path / "page.html").read_text()
    assert f"<figcaption>{base.path}, step 1,200</figcaption>" in text
    assert f"<figcaption>{other.path}, step 200</figcaption>" in text
    assert "at different steps, and may differ by that alone" in text
    assert of_other_steps(pictures)
    assert of_other_steps({base.path: Picture(picture, 200)}) == ""


def test_without_pictures_or_common_steps_the_page_says_so(tmp_path: Path):
    base, other = open_run(recorded(tmp_path / "a")), open_run(recorded(tmp_path / "b", fingerprint="others"))
    write_comparison(tmp_path / "page.html", base, [other], {}, "")
    text = (tmp_path / "page.html").read_text()
    assert "they are of other images" in text
    assert "The same images" not in text


@pytest.mark.parametrize("logarithmic", [False, True])
def test_points_are_drawn_where_they_are(logarithmic):
    values = [(10.0, 0.5), (100.0, 0.25), (1000.0, 0.125)]
    svg = line_plot("a <b>", [Curve("run", values)], "step", logarithmic)
    root = ElementTree.fromstring(svg)
    line = next(root.iter("polyline")).attrib["points"]
    points = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # the x axis is logarithmic
    assert y0 < y1 < y2
    halves = (y1 - y0) / (y2 - y1)
    assert halves == pytest.approx(1.0 if logarithmic else 2.0, abs=0.05)


def test_error_bars_are_as_long_as_the_error():
    svg = line_plot("t", [Curve("run", [(1.0, 2.0), (2.0, 4.0)], [1.0, 0.5])], "step")
    root = ElementTree.fromstring(svg)
    bars = [line for line in root.iter("line") if "stroke" in line.attrib]
    lengths = [abs(float(bar.attrib["y1"]) - float(bar.attrib["y2"])) for bar in bars]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.2)


def test_nothing_to_draw_is_nothing():
    assert line_plot("t", [Curve("run", [])], "step") == ""
    assert re.search("nan|inf", line_plot("t", [Curve("run", [(1.0, 2.0)])], "step")) is None


def test_ticks_are_round_and_between_the_ends():
    for low, high in ((0.0, 1.0), (-3.7, 12.9), (1e-4, 2e-4)):
        ticks = Axis([low, high], 0, 1, False).ticks()
        assert 3 <= len(ticks) <= 11
        assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    ticks = Axis([3.0, 4000.0], 0, 1, True).ticks()
    assert all(math.log10(tick) % 1 == pytest.approx(0, abs=1e-9) for tick in ticks)
