"""What may come of a command whose arguments or files were made up: it ends well, or one line refuses it."""

import contextlib
import io

import pytest

from ddpm_fast.cli import main as cli


def said(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit status and its one line of error, "" where it ends well."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert isinstance(stop.value.code, int)
    errors = [line for line in err.getvalue().splitlines() if line.startswith("ddpm-fast: ")]
    assert len(errors) == (stop.value.code != 0), err.getvalue()
    return stop.value.code, "".join(errors)
