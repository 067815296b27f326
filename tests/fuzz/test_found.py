"""What fuzzing found, one example of each: it ended in a traceback, or worse, before it was mended."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ddpm_fast.config import DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.data.image_files import Unusable, decode, is_encoded, is_picture
from ddpm_fast.errors import InputError
from ddpm_fast.runs import checkpoint, evaluation
from tests.fuzz.refusals import said
from tests.refusals import refused

UNET = UNetConfig(3, 8, 8, channels=32, channel_multipliers=(1,), attention_resolutions=())
DEEP = b"[" * 100_000
FILES = ["config.json", "metrics.jsonl", "origin/step-0000000.json", "samples/dpm++-20-seed0/samples.json"]


def commands(run: Path, *more: str) -> None:
    for arguments in (
        ["ls", str(run)],
        ["compare", str(run), str(run), *more],
        ["train", "--out", str(run), "--resume"],
    ):
        assert said(arguments)[0] in (0, 2)


@pytest.mark.parametrize("name", [*FILES, "checkpoints/step-0000003/state.json"])
def test_json_that_is_nested_deeper_than_python_recurses(name, copy):
    (copy / name).write_bytes(DEEP)
    commands(copy)
    assert said(["sample", str(copy), "-n", "1"])[0] == (2 if name.endswith("state.json") else 0)


METRICS: list[dict[str, object]] = [
    {"step": "3", "loss": 1.0},
    {"step": 3.5, "loss": 1.0},
    {"step": 3, "loss": 1.0, "wall": 7},
    {"step": 3, "loss": 1.0, "wall": {"seconds": 1.0}},
    {"step": 3, "loss": 1.0, "quality": {"frechet_pixels_5": "low"}},
    {"step": 3, "quality": None},
]


def test_metrics_of_other_types(copy):
    (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in METRICS))
    commands(copy)


def test_evaluations_of_other_shapes_are_none(copy):
    file = copy / "evaluation/step-0000003.safetensors"
    whole = safetensors.torch.load_file(file)
    others = [("image", torch.zeros(128)), ("image", torch.zeros(127, dtype=torch.int64)), ("ema", torch.zeros(0))]
    others += [("log_snr", torch.zeros(128, 2)), ("raw", torch.zeros(128, dtype=torch.int8))]
    assert evaluation.read(copy, 3) is not None
    for name, other in others:
        safetensors.torch.save_file({**whole, name: other}, file)
        assert evaluation.read(copy, 3) is None


def test_versions_that_are_no_object_are_no_origin(copy):
    file = copy / "origin/step-0000000.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"versions": ["2.13"]}))
    commands(copy)


@pytest.mark.parametrize(
    ("cls", "keywords"),
    [
        (UNetConfig, {"res_blocks": 10**9}),
        (UNetConfig, {"channels": 10**30, "groups": 1}),
        (UNetConfig, {"channel_multipliers": (1, 10**12)}),
        (UNetConfig, {"height": 2**40}),
        (DiffusionConfig, {"timesteps": 10**12}),
        (TrainingConfig, {"steps": 10**30}),
    ],
)
def test_sizes_that_no_memory_holds_are_refused_before_anything_is_built(cls, keywords):
    with pytest.raises(InputError, match=r"at most|more than"):
        cls(**keywords)


def test_a_run_whose_name_is_no_text(copy):
    called = Path(os.fsdecode(os.fsencode(copy) + b" \xff\n\x1b[31m"))
    copy.rename(called)
    commands(called, "--out", str(called.parent / "page.html"), "--images", "0")
    status, line = said(["sample", str(called / "nowhere")])
    assert status == 2
    assert line.isprintable()


def test_a_configuration_file_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "flags.toml").write_bytes(b"steps = " + DEEP)
    assert "flags.toml is not readable TOML" in said(["train", "--config", str(tmp_path / "flags.toml")])[1]


def test_arrays_in_the_other_kind_of_file(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "images.npz").rename(tmp_path / "images.npy")
    assert "images.npy" in refused(lambda: open_dataset(DataConfig(str(tmp_path / "images.npy")), UNET))
    np.save(tmp_path / "upper.npy", np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "upper.npy").rename(tmp_path / "UPPER.NPY")
    assert len(open_dataset(DataConfig(str(tmp_path / "UPPER.NPY")), UNET)) == 4


def test_a_decoder_that_has_not_implemented_what_a_file_asks_for():
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "DDS")
    data = bytearray(buffer.getvalue())
    data[80:84] = (16384).to_bytes(4, "little")
    assert not is_encoded(bytes(data))
    with pytest.raises(Unusable, match="pixel format"):
        decode(bytes(data), (8, 8, 3))


def test_what_ghostscript_would_run_is_no_picture(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **_: ran.append(arguments))
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **_: ran.append(arguments))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    Image.open(io.BytesIO(buffer.getvalue()))  # which Pillow takes for a picture
    assert not is_picture(Path("a.eps"))
    assert not is_picture(Path("a.PS"))
    assert not is_encoded(buffer.getvalue())
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert "a.png (not an image)" in refused(lambda: open_dataset(DataConfig(str(tmp_path)), UNET))
    assert ran == []


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        "ls",
        "sample",
        "evaluate",
        "check",
        "data",
        "train --init",
        "train --against",
        "train --resume --out",
        "train --data",
    ],
)
def test_a_name_that_is_too_long_for_a_file(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, line = said([*arguments.split(), LONG])
    assert status == 2
    assert LONG in line
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_latest_that_no_file_can_have(copy):
    (copy / "checkpoints/latest").write_bytes(b"step\0\n")
    newest = checkpoint.newest_whole(copy)
    assert newest is not None
    assert newest.step == 3
