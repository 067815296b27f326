"""How often: `python -m pytest tests/fuzz --hypothesis-profile soak` tries fifty times as much as the slow tests do."""

import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from tests.fuzz.refusals import said
from tests.security.commands import TINY

settings.register_profile("soak", max_examples=5000)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is finished, with samples."""
    run = tmp_path_factory.mktemp("whole") / "run"
    for arguments in (["train", "--out", str(run), *TINY, "--log-every", "1"], ["sample", str(run), "-n", "2"]):
        assert said(arguments)[0] == 0
    return run


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")
