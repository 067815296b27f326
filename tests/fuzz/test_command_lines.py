"""Command lines of real flags with any values, and of junk: they are understood, or refused in one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_fast.cli.main import commands
from ddpm_fast.cli.parsing import flags_of
from ddpm_fast.presets import PRESETS
from tests.fuzz.amounts import often
from tests.fuzz.mutations import TEXTS, damaged
from tests.fuzz.refusals import said

WORK = {
    "ddpm_fast.cli.commands": ("train", "check"),
    "ddpm_fast.cli.sampling": ("sample",),
    "ddpm_fast.cli.evaluating": ("evaluate",),
    "ddpm_fast.cli.comparing": ("compare",),
    "ddpm_fast.cli.looking": ("look",),
    "ddpm_fast.cli.converting": ("convert",),
}
"""What commands do once they are understood; `ls` and the refusals of `sweep` are quick."""
NUMBERS = (
    st.integers(-2, 100) | st.integers() | st.floats() | st.sampled_from(["1e3", "0x10", "1_000", "-0", "٣", "1 2"])
)
CHOICES = (*PRESETS, "auto", "ddim", "dpm++", "cpu", "fp32", "eps", "cosine", "digits", "data", "png", "here", "up.npy")
JUNK = TEXTS.filter(lambda text: not text.startswith("hf:")) | st.sampled_from(
    ["--", "-", "-n", "-h", "--help", "=", "--=", "--out=", "--tyro-print-completion", "--version", "-1", "$(touch x)"]
)
VALUES = NUMBERS.map(str) | st.sampled_from(CHOICES) | JUNK
TOML = b'preset = "digits"\nsteps = 30\n\n[unet]\nchannels = 16\nchannel_multipliers = [1, 2]\n\n[data]\nflip = true\n'


def words(flags: list[str]) -> st.SearchStrategy[list[str]]:
    """Return a few words: a flag with a value, or without one, or with =; or what is no flag."""
    flag = st.sampled_from(flags)
    misspelt = st.tuples(flag, st.integers(2, 12), TEXTS).map(lambda each: each[0][: each[1]] + each[2])
    named = flag | flag | flag.map(lambda name: f"--no-{name[2:]}") | flag.map(lambda name: name.replace("-", "_"))
    with_value = st.tuples(named | misspelt, VALUES).map(list)
    joined = st.tuples(named, VALUES).map(lambda each: [f"{each[0]}={each[1]}"])
    return with_value | with_value | joined | named.map(lambda name: [name]) | VALUES.map(lambda value: [value])


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    known = commands()
    command = draw(st.sampled_from([*known, *known, *known, "trian", "", "--version", "--completion", "help"]))
    flags = flags_of(known[command].arguments) if command in known else ["--steps"]
    parts = draw(st.lists(words(flags), max_size=5))
    return [command, *(word for part in parts for word in part)]


@pytest.fixture
def nothing_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do none of the work, in an empty directory; afterwards nothing may be in it."""
    for module, names in WORK.items():
        for name in names:
            monkeypatch.setattr(f"{module}.{name}", lambda *_: 0)
    monkeypatch.setattr("ddpm_fast.data.dataset.hub_name", lambda _: None)
    monkeypatch.setattr("ddpm_fast.cli.main.Signals", _NoSignals)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert list((tmp_path / "here").iterdir()) == []


class _NoSignals:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


@often(fast=50, slow=500)
def test_any_line_is_understood_or_refused_in_one_line(examples, nothing_done):
    count = {0: 0, 2: 0}

    @examples
    @given(lines())
    def check(arguments: list[str]) -> None:
        status, line = said(arguments)
        assert len(line) < 10_000
        count[status] += 1

    check()
    assert min(count.values()) > 3, count


@often(fast=15, slow=150)
def test_a_damaged_file_of_flags_is_understood_or_refused_by_its_name(examples, tmp_path_factory, nothing_done):
    file = tmp_path_factory.mktemp("flags") / "flags.toml"
    file.write_bytes(TOML)
    assert said(["train", "--config", str(file)])[0] == 0

    @examples
    @given(damaged(TOML) | st.sampled_from([b"a = " + b"[" * 100_000]))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        status, line = said(["train", "--config", str(file)])
        assert status == 0 or "flags.toml" in line or "--" in line, line

    check()
