"""Commands as a user runs them, in this process."""

import pytest

from ddpm_fast.cli import main as cli

TINY = [
    "--channels",
    "8",
    "--channel-multipliers",
    "1",
    "--res-blocks",
    "1",
    "--attention-resolutions",
    "--groups",
    "4",
]
TINY += ["--batch-size", "4", "--steps", "3", "--cooldown", "0", "--timesteps", "25", "--schedule", "linear"]
TINY += ["--beta-end", "0.5", "--device", "cpu"]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run the command line; return its exit status and what it said on standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, arguments)])
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end in one line and status 2; return the line."""
    status, said = command(capsys, *arguments)
    assert status == 2
    assert said.count("\n") == 1, said
    return said
