"""A malicious pickle of each kind, in each place where a file is read: refused by its name, and never executed."""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_fast.config import DataConfig
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.presets import PRESETS
from tests.security.commands import TINY, command, refused


class Malicious:
    """Writes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "executed")


def pickles(marker: Path) -> dict[str, bytes]:
    """Return the same malice in each form that PyTorch and NumPy know."""
    evil, found = Malicious(marker), {f"protocol {p}": pickle.dumps(Malicious(marker), p) for p in range(6)}
    for name, zipped in (("torch.save", True), ("torch.save before 1.6", False)):
        buffer = io.BytesIO()
        torch.save({"state_dict": evil}, buffer, _use_new_zipfile_serialization=zipped)
        found[name] = buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, np.array([evil], dtype=object), allow_pickle=True)
    found["numpy"] = buffer.getvalue()
    buffer = io.BytesIO()
    np.savez(buffer, images=np.array([evil], dtype=object))
    found["numpy's zip"] = buffer.getvalue()
    return found


def test_the_pickles_are_malicious(marker):
    for name, data in pickles(marker).items():
        if name.startswith("numpy"):
            loaded = np.load(io.BytesIO(data), allow_pickle=True)
            assert loaded["images"] is not None if name == "numpy's zip" else True
        elif name.startswith("torch"):
            torch.load(io.BytesIO(data), weights_only=False)
        else:
            pickle.loads(data)
        assert marker.read_text() == "executed", name
        marker.unlink()


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt", "model.pth", "ema.safetensors", "state.json"])
def test_a_pickle_that_is_named_as_a_checkpoint_is_refused(name, marker, tmp_path, capsys):
    for data in pickles(marker).values():
        (tmp_path / name).write_bytes(data)
        for arguments in (("sample", tmp_path / name), ("train", "--init", tmp_path / name)):
            assert str(tmp_path / name) in refused(capsys, *arguments)
    assert not marker.exists()


@pytest.mark.parametrize("part", ["ema", "model", "optimizer", "state"])
def test_a_pickle_in_the_place_of_a_checkpoint_s_file_is_refused(part, trained, marker, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    name = "state.json" if part == "state" else f"{part}.safetensors"
    for kind, data in pickles(marker).items():
        for state in run.glob("checkpoints/step-*"):
            (state / name).write_bytes(data)
        said = refused(capsys, "train", "--out", run, "--resume", "--steps", 4)
        assert name in said
        assert "pickle" in said or kind in ("protocol 0", "protocol 1", "numpy"), said
    assert not marker.exists()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"])
def test_a_pickle_in_a_diffusers_folder_is_refused(name, trained, marker, tmp_path, capsys):
    assert command(capsys, "convert", trained, tmp_path / "theirs", "--images", 0)[0] == 0
    (tmp_path / "theirs/unet/diffusion_pytorch_model.safetensors").unlink()
    for data in pickles(marker).values():
        (tmp_path / "theirs" / name).write_bytes(data)
        assert name in refused(capsys, "convert", tmp_path / "theirs", tmp_path / "ours")
    assert not marker.exists()
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet", ".tar", ".pkl", ".png"])
def test_a_pickle_as_images_is_refused(suffix, marker, tmp_path, capsys):
    file = tmp_path / f"images{suffix}"
    for kind, data in pickles(marker).items():
        file.write_bytes(data)
        said = refused(capsys, "train", "--data", file, "--out", tmp_path / "run", *TINY)
        assert str(file) in said
        if (suffix, kind) in ((".npy", "numpy"), (".npz", "numpy's zip")):
            assert "pickled objects" in said
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


def test_labels_and_classes_that_are_pickles_are_refused(marker, tmp_path, capsys):
    evil, good = np.array([Malicious(marker)] * 4, dtype=object), np.arange(4)
    for labels, classes in ((evil, good), (good, evil)):
        np.savez(tmp_path / "images.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels, classes=classes)
        assert "pickled objects" in refused(capsys, "data", tmp_path / "images.npz", "--out", tmp_path / "x.png")
    assert not marker.exists()


def test_a_cache_that_holds_pickles_is_made_anew(marker, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.save(tmp_path / "images.npy", np.full((4, 9, 9), 200, np.uint8))
    data, unet = DataConfig(str(tmp_path / "images.npy")), PRESETS["digits"].unet
    for _ in range(2):
        assert int(open_dataset(data, unet).images.min()) == 200
        (store,) = (tmp_path / "cache/ddpm-fast").glob("*.npy")
        store.write_bytes(pickles(marker)["numpy"])
    assert not marker.exists()
