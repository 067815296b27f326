"""How many examples a property is tried on: few in every test run, many in the slow one, far more in a soak."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ORDINARY = 100
"""Hypothesis's own number of examples: another, by --hypothesis-profile, multiplies the slow tests'."""
MEMORY_BYTES = 4 << 30


def often(fast: int, slow: int) -> pytest.MarkDecorator:
    """Give a test its `examples`, a decorator of the property that it tries: so many, and when it is slow so many."""
    factor = settings.default.max_examples / ORDINARY  # pyright: ignore[reportOptionalMemberAccess]
    amounts = [_settings(fast, True), _settings(round(slow * factor), factor == 1)]
    params = [pytest.param(amounts[0], id="few"), pytest.param(amounts[1], id="many", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("examples", params)


def _settings(count: int, repeatable: bool) -> settings:
    return settings(
        max_examples=count,
        derandomize=repeatable,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],  # pyright: ignore[reportArgumentType]
    )


@contextmanager
def little_memory() -> Iterator[None]:
    """Let this process allocate little more than it has: what a file's header makes it ask for beyond that fails."""
    facts = Path("/proc/self/statm")
    if not facts.exists():  # only Linux says it so
        yield
        return
    import resource

    used = int(facts.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
