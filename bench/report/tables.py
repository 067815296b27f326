"""Numbers and Markdown tables as the report writes them."""

from collections.abc import Callable, Iterable
from typing import Any


def duration(seconds: float) -> str:
    """Return seconds in the unit that reads best, three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def with_spread(samples: dict[str, Any], form: Callable[[float], str] = duration) -> str:
    """Return a median with its quartiles."""
    return f"{form(samples['median'])} ({form(samples['low'])} to {form(samples['high'])})"


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def share(value: float | None) -> str:
    """Return a share as a percentage."""
    return "-" if value is None else f"{value:.0%}"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, followed by an empty one."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]
