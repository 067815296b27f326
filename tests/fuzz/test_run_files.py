"""A run whose files were damaged or exchanged: every command does its work, or says in one line which file is wrong."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_fast.errors import InputError
from ddpm_fast.runs import checkpoint
from tests.fuzz.amounts import little_memory, often
from tests.fuzz.mutations import damaged, exchanged
from tests.fuzz.refusals import said
from tests.refusals import refused

STATE = checkpoint.path_of(Path(), 3)
JSON = ("config.json", "metrics.jsonl", "samples/dpm++-20-seed0/samples.json", "origin/step-0000000.json")
TENSORS = tuple(STATE / f"{part}.safetensors" for part in checkpoint.TENSOR_FILES)


@often(fast=60, slow=500)
def test_a_damaged_file_of_a_checkpoint_is_refused_by_its_name(examples, copy):
    files = {name: (copy / name).read_bytes() for name in (*TENSORS, STATE / "state.json")}

    @examples
    @given(st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), damaged(files[name]))))
    def check(drawn: tuple[Path, bytes]) -> None:
        name, data = drawn
        (copy / name).write_bytes(data)
        line = refused(lambda: checkpoint.read(copy / STATE).verify())
        assert (str(copy / name) in line) == (data != files[name]), line
        (copy / name).write_bytes(files[name])

    with little_memory():
        check()


@st.composite
def lying(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw a safetensors file whose header is JSON of other values, or of another length than it says."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(draw(exchanged({name: header[name] for name in list(header)[:3]}) | exchanged(header))).encode()
    said = draw(st.just(len(text)) | st.sampled_from([0, 2**31, 2**63, 2**64 - 1]) | st.integers(0, 2 * len(text)))
    return struct.pack("<Q", said) + text + data[8 + length :]


def seal(file: Path, state: Any) -> None:
    """Write a state.json, with a digest that fits where it can have one."""
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name != "digest"}
        file.write_bytes(checkpoint._sealed(state))
    else:
        file.write_text(json.dumps(state))


@often(fast=40, slow=300)
def test_a_checkpoint_that_lies_though_its_digests_fit_is_refused_by_its_name(examples, copy):
    from ddpm_fast.runs.trained_model import unet_of

    state = json.loads((copy / STATE / "state.json").read_text())
    ema = (copy / TENSORS[1]).read_bytes()

    @examples
    @given(st.tuples(exchanged(state), st.just(ema)) | st.tuples(st.just(state), lying(ema)))
    def check(drawn: tuple[Any, bytes]) -> None:
        other, data = drawn
        (copy / TENSORS[1]).write_bytes(data)
        if other is state:
            other = state | {"digests": state["digests"] | {"ema": checkpoint._blake2(data).hexdigest()}}
        seal(copy / STATE / "state.json", other)
        line = refused(lambda: unet_of(checkpoint.read(copy / STATE, ("ema",)), "ema"))
        assert not line or str(copy / STATE) in line
        assert line or data == ema or json.dumps(other)

    with little_memory():
        check()


@st.composite
def another_file(draw: st.DrawFn, run: Path) -> tuple[str, bytes]:
    """Draw a file of a run, with other bytes, other values, or those of another of its files."""
    files = {name: (run / name).read_bytes() for name in (*JSON, "evaluation/step-0000003.safetensors")}
    name = draw(st.sampled_from(sorted(files)))
    kinds = [damaged(files[name]), st.sampled_from(sorted(files)).map(files.__getitem__)]
    if name == "metrics.jsonl":
        lines = files[name].splitlines()
        kinds += [exchanged(json.loads(lines[i])).map(lambda v, i=i: _with(lines, i, v)) for i in range(len(lines))]
    elif name in JSON:
        kinds += 3 * [exchanged(json.loads(files[name])).map(lambda value: json.dumps(value).encode())]
    else:
        kinds += 3 * [lying(files[name])]
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000])
    return name, draw(st.one_of(*kinds, deep))


def _with(lines: list[bytes], i: int, value: Any) -> bytes:
    return b"\n".join([*lines[:i], json.dumps(value).encode(), *lines[i + 1 :]]) + b"\n"


COMMANDS = {
    "ls": ["ls", "RUN"],
    "ls --json": ["ls", "RUN", "--json"],
    "compare": ["compare", "RUN", "WHOLE", "--out", "PAGE", "--images", "0"],
    "sample": ["sample", "RUN", "-n", "2"],
    "evaluate": ["evaluate", "RUN", "-n", "2"],
    "resume": ["train", "--out", "RUN", "--resume"],
}
"""`resume` of a run that is finished says so, once it has read what it is."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes long and reads no file of a run: the evaluator, and sampling."""
    from ddpm_fast.runs.trained_model import Model

    def no_images(*_: Any, **__: Any) -> Iterator[Any]:
        raise InputError("no images are made here")

    monkeypatch.setattr(Model, "batches", no_images)
    monkeypatch.setattr("ddpm_fast.cli.evaluating.evaluator_of", lambda *_: None)
    monkeypatch.setattr("ddpm_fast.launch.check_run", lambda *_, **__: [], raising=False)


@pytest.mark.parametrize("command", COMMANDS)
@often(fast=5, slow=30)
def test_a_command_works_or_says_in_one_line_what_is_wrong(command, examples, whole, tmp_path, quick):
    count = [0]

    @examples
    @given(another_file(whole))
    def check(drawn: tuple[str, bytes]) -> None:
        name, data = drawn
        run = shutil.copytree(whole, tmp_path / f"{count[0]}")
        count[0] += 1
        (run / name).write_bytes(data)
        words = {"RUN": str(run), "WHOLE": str(whole), "PAGE": str(tmp_path / "page.html")}
        status, _ = said([words.get(word, word) for word in COMMANDS[command]])
        assert status in (0, 2)
        shutil.rmtree(run)

    check()
