"""How far work is, without a terminal: lines now and then, and times as a person says them."""

import pytest

from ddpm_fast import progress
from ddpm_fast.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3599, "60 min"),
        (5400, "1.5 hours"),
        (40 * 3600, "1.7 days"),
        (13.4 * 86400, "13 days"),
        (4000 * 86400, "4,000 days"),
    ],
)
def test_durations_are_those_of_a_person(seconds, says):
    assert duration(seconds) == says


def test_long_work_says_where_it_is_now_and_then(clock, capsys):
    with Progress("decoding", 1000, "image", bar=False) as shown:
        for _ in range(1000):
            clock.seconds += 0.125  # exact in binary
            shown.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "decoding: 40 of 1,000 images, 2 min left",
        "decoding: 280 of 1,000 images, 90 s left",
        "decoding: 520 of 1,000 images, 60 s left",
        "decoding: 760 of 1,000 images, 30 s left",
        "decoding: 1,000 of 1,000 images, 0 s left",
    ]


def test_quick_work_and_work_that_nobody_watches_say_nothing(clock, capsys):
    for bar, seconds in ((False, 0.004), (None, 1.0)):
        with Progress("decoding", 1000, "image", bar) as shown:
            for _ in range(1000):
                clock.seconds += seconds
                shown.advance()
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.parametrize(("out", "lines"), [(True, False), (False, True)])
def test_a_log_is_filled_beside_a_terminals_bar(monkeypatch, out, lines):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: out)
    assert progress.lines_wanted(bar=True) is lines
    assert progress.lines_wanted(bar=False)
