"""What may come of input that was made up: the work is done, or one sentence refuses it."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest

from ddpm_fast.cli import main as cli
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


def said(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit status and its one line of error, "" where it ends well."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert isinstance(stop.value.code, int)
    errors = [line for line in err.getvalue().splitlines() if line.startswith("ddpm-fast: ")]
    assert len(errors) == (stop.value.code != 0), err.getvalue()
    return stop.value.code, "".join(errors)
