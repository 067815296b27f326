"""Checkpoints are whole or not at all, and never unpickled."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.presets import PRESETS
from ddpm_fast.runs import checkpoint

TENSOR_FILES = {part: {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)} for part in checkpoint.TENSOR_FILES}


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run, step, PRESETS["digits"], "f" * 40, TENSOR_FILES)


def test_what_is_saved_is_read_back(tmp_path):
    path = save(tmp_path, 7)
    for name in (tmp_path, path):
        found = checkpoint.resolve(name)
        assert (found.step, found.config, found.fingerprint) == (7, PRESETS["digits"], "f" * 40)
        for part, tensors in TENSOR_FILES.items():
            for key, value in found.tensors(part).items():
                torch.testing.assert_close(value, tensors[key], rtol=0, atol=0)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-0000007"]


def test_channels_last_tensors_keep_their_values(tmp_path):
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    path = checkpoint.save(
        tmp_path, 1, PRESETS["digits"], "", {part: {"w": weight} for part in checkpoint.TENSOR_FILES}
    )
    torch.testing.assert_close(checkpoint.read(path).tensors("ema")["w"], weight, rtol=0, atol=0)


def test_a_torn_newest_checkpoint_gives_way_to_the_one_before(tmp_path):
    save(tmp_path, 1)
    torn = save(tmp_path, 2) / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-5])
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert checkpoint.resolve(tmp_path).step == 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "foreign"])
@pytest.mark.parametrize("name", ["state.json", "ema.safetensors"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, name, damage):
    file = save(tmp_path, 1) / name
    content = {"truncated": file.read_bytes()[:40], "empty": b"", "foreign": b"[1, 2, 3]"}
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[damage])
    with pytest.raises(InputError) as refused:
        checkpoint.read(file.parent)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_part_that_is_not_needed_may_be_missing(tmp_path):
    path = save(tmp_path, 1)
    for part in ("model", "optimizer"):
        (path / f"{part}.safetensors").unlink()
    for name in (tmp_path, path):
        assert checkpoint.resolve(name, ("ema",)).tensors("ema").keys() == TENSOR_FILES["ema"].keys()
        with pytest.raises(InputError, match=r"model.safetensors is missing"):
            checkpoint.resolve(name, ("model",))
        with pytest.raises(InputError, match=r"model.safetensors is missing"):
            checkpoint.resolve(name)
    assert checkpoint.newest(tmp_path) is None


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    left_over = tmp_path / "checkpoints/.step-0000001.77.tmp"
    left_over.mkdir(parents=True)
    save(tmp_path, 2)
    assert not left_over.exists()


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


@pytest.mark.parametrize("where", ["file", "inside"])
def test_a_pickle_is_refused_and_never_loaded(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1) / "model.safetensors" if where == "inside" else tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="pickle"):
        checkpoint.resolve(path if where == "file" else path.parent)
    assert not Path("exploded").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, 1)
    write = checkpoint.write_synced

    def fill_up(path: Path, data: bytes) -> None:
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_synced", fill_up)
    with pytest.raises(InputError, match="No space left on device"):
        save(tmp_path, 2)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-0000001"]


@pytest.mark.parametrize("name", ["nowhere", ""])
def test_a_run_without_checkpoints_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match=r"does not exist|holds no checkpoint"):
        checkpoint.resolve(tmp_path / name)


def test_safetensors_hold_no_metadata_and_state_no_time(tmp_path):
    path = save(tmp_path, 3)
    header = (path / "model.safetensors").read_bytes()
    assert b"__metadata__" not in header
    said = {"format", "step", "fingerprint", "config", "digests", "digest"}
    assert set(json.loads((path / "state.json").read_text())) == said


def flip(file: Path, byte: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"])
def test_any_flipped_bit_is_refused_by_the_name_of_the_file(tmp_path, name):
    file = save(tmp_path, 1) / name
    whole = file.read_bytes()
    for byte in range(0, len(whole), 19 if name == "state.json" else 5):
        flip(file, byte, byte % 8)
        with pytest.raises(InputError, match=name) as refused:
            checkpoint.read(file.parent).verify()
        assert "\n" not in str(refused.value)
        file.write_bytes(whole)
    checkpoint.read(file.parent).verify()


def test_the_digests_are_blake2_as_the_standard_library_has_it(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    for part, digest in state["digests"].items():
        assert hashlib.blake2b((path / f"{part}.safetensors").read_bytes(), digest_size=32).hexdigest() == digest
    assert state["digests"].keys() == set(checkpoint.TENSOR_FILES)


def test_damaged_weights_are_not_read_and_an_older_checkpoint_is_taken_saying_so(tmp_path, capsys):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "ema.safetensors", -1, 5)
    with pytest.raises(InputError, match=r"step-0000002/ema.safetensors: it is damaged"):
        checkpoint.read(tmp_path / "checkpoints/step-0000002").tensors("ema")
    found = checkpoint.resolve(tmp_path, ("ema",))
    assert found.step == 1
    said = capsys.readouterr().err
    assert "passed over:" in said
    assert "step-0000002/ema.safetensors" in said
    assert "taking step 1" in said
    assert checkpoint.resolve(tmp_path, ("model",)).step == 2
    assert capsys.readouterr().err == ""
    flip(tmp_path / "checkpoints/step-0000001/state.json", 30, 1)
    with pytest.raises(InputError, match=r"step-0000002/ema.safetensors: it is damaged"):
        checkpoint.resolve(tmp_path, ("ema",))


def test_a_checkpoint_of_the_first_format_which_had_no_digests_is_read(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    del state["digests"], state["digest"]
    (path / "state.json").write_bytes(checkpoint.to_json(state | {"format": "ddpm-fast checkpoint 1"}))
    found = checkpoint.resolve(tmp_path)
    assert (found.step, found.config, found.tensors("ema").keys()) == (1, PRESETS["digits"], TENSOR_FILES["ema"].keys())


def test_a_checkpoint_that_was_renamed_before_latest_was_written_is_the_newest(tmp_path):
    """As a kill between the two leaves it."""
    for step in (1, 10_000_000):
        save(tmp_path, step)
    (tmp_path / "checkpoints/latest").write_text("step-0000001\n")
    assert checkpoint.resolve(tmp_path).step == 10_000_000


def test_a_checkpoint_of_the_same_step_is_replaced_or_stays(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    (path / "mine").touch()
    replace, calls = Path.replace, []

    def fail_at_the_second(old: Path, new: Path) -> Path:
        calls.append(old.name)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return replace(old, new)

    with monkeypatch.context() as patches:
        patches.setattr(Path, "replace", fail_at_the_second)
        with pytest.raises(InputError, match="Input/output error"):
            save(tmp_path, 1)
    assert (path / "mine").exists()
    save(tmp_path, 1)
    assert not (path / "mine").exists()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["latest", "step-0000001"]
