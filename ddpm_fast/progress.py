"""How far a long piece of work is: a bar in a terminal; elsewhere a flushed line now and then, with the same facts.

A terminal that shows bars on stderr while stdout goes to a file gets both: `ddpm-fast train > log` fills the log.
"""

import sys
import time
from types import TracebackType

from tqdm import tqdm

FIRST_LINE_SECONDS, LINE_SECONDS = 5.0, 30.0
"""Work that takes less says nothing; then this often."""


def lines_wanted(bar: bool) -> bool:
    """Return whether stdout gets lines, given that bars are shown or not."""
    return not bar or (sys.stderr.isatty() and not sys.stdout.isatty())


def say(text: str) -> None:
    """Print a line at once, above any bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Say a time as a person would: "48 s", "14 min", "5.5 hours", "13 days"."""
    for least, unit, name in ((129600, 86400, "days"), (5400, 3600, "hours"), (120, 60, "min")):
        if seconds >= least:
            value = seconds / unit
            return f"{value:.1f} {name}" if value < 10 and name != "min" else f"{value:,.0f} {name}"
    return f"{seconds:.0f} s"


class Progress:
    """Counts the units of a piece of work; a context."""

    def __init__(self, what: str, total: int, unit: str, bar: bool | None, leave: bool = True) -> None:
        """Begin to count.

        Args:
            what: is done, as "decoding".
            total: units of it.
            unit: the name of one.
            bar: show a bar, or say lines; None for neither.
            leave: the finished bar on the screen.
        """
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.bar = tqdm(total=total, unit=unit, desc=what, disable=not bar, leave=leave)
        self._lines, self._started = bar is not None and lines_wanted(bar), time.perf_counter()
        self._next_line = self._started + FIRST_LINE_SECONDS

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def rename(self, what: str) -> None:
        """Say from now on that something else is done."""
        if what != self.what:
            self.what = what
            self.bar.set_description(what, refresh=False)

    def expect(self, units: int) -> None:
        """Count on so many units from now on, which are more than was thought."""
        self.total = self.bar.total = self.done + units

    def advance(self, units: int = 1) -> None:
        """Count units that are done."""
        self.done += units
        self.bar.update(units)
        now = time.perf_counter()
        if self._lines and now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            left = (now - self._started) / max(self.done, 1) * (self.total - self.done)
            say(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}s, {duration(left)} left")
