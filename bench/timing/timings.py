"""Repeated timings of one piece of work, and the ratio of two that were timed in turns."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """Repeated measurements of one quantity, in the order in which they were taken."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("no samples: at least one value is needed")

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The first quartile; with `high` the spread that is reported, since timings have a long upper tail."""
        return self._quartiles()[0]

    @property
    def high(self) -> float:
        """The third quartile."""
        return self._quartiles()[2]

    def _quartiles(self) -> Sequence[float]:
        return statistics.quantiles(self.values, method="inclusive") if self.n > 1 else self.values * 3

    def map(self, change: Callable[[float], float]) -> "Timings":
        """Return the samples of another unit, e.g. seconds per step from seconds per call."""
        return Timings(tuple(change(value) for value in self.values))

    def to_json(self) -> dict[str, float | int]:
        """Return what a report keeps."""
        return {"median": self.median, "low": self.low, "high": self.high, "n": self.n}


def ratio(numerator: Timings, denominator: Timings) -> Timings:
    """Return the ratio of each round: both sides of a round saw the same state of the machine.

    Raises:
        ValueError: the numbers of rounds differ.
    """
    if numerator.n != denominator.n:
        raise ValueError(f"{numerator.n} rounds cannot be paired with {denominator.n}")
    return Timings(tuple(a / b for a, b in zip(numerator.values, denominator.values, strict=True)))
