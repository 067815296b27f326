"""A run, and a file that must never appear."""

from pathlib import Path

import pytest

from ddpm_fast.cli import main as cli
from tests.security.commands import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--out", str(directory), *TINY, "--sample-every", "0"])
    return directory


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Return the file that malicious code writes where it is run."""
    return tmp_path / "executed"
