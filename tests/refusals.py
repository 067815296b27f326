"""What may come of work on input that is wrong: it is done, or one sentence refuses it."""

from collections.abc import Callable
from typing import Any

from ddpm_fast.errors import InputError


def refused(work: Callable[[], Any]) -> str:
    """Return the line by which work is refused, or "" where it is done; any other error is a defect."""
    try:
        work()
    except InputError as error:
        line = str(error)
    else:
        return ""
    assert line
    assert "\n" not in line
    return line
