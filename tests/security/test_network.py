"""The network is touched for nothing but what a command names as remote."""

import socket
import subprocess
import sys
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

import ddpm_fast
from tests.security.commands import TINY, command, refused


def no_network(*arguments: object, **_: object) -> NoReturn:
    raise AssertionError(f"a connection was asked for: {arguments}")


CONNECTING = [(socket.socket, name) for name in ("connect", "connect_ex", "sendto", "sendmsg")]
CONNECTING += [(socket, name) for name in ("getaddrinfo", "gethostbyname", "create_connection")]


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Close the network, and hold a token that nobody may be sent."""
    for owner, name in CONNECTING:
        monkeypatch.setattr(owner, name, no_network)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


@pytest.mark.slow
def test_no_command_on_local_things_connects(closed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(24):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    train = ["train", "--preset", "digits", "--data", "photos", *TINY, "--sample-every", 3]
    commands: list[list[Any]] = [
        ["data", "photos", "--out", "sheet.png"],
        [*train, "--out", "runs/a"],
        ["train", "--out", "runs/a", "--resume", "--steps", 4],
        ["sample", "runs/a", "-n", 2, "--animate"],
        ["evaluate", "runs/a", "-n", 24],
        ["compare", "runs/a", "runs/a", "--out", "page.html", "--images", 2],
        ["ls"],
        ["convert", "runs/a", "theirs", "--images", 1],
        ["convert", "theirs", "ours"],
    ]
    for arguments in commands:
        status, said = command(capsys, *arguments)
        assert status == 0, (arguments, said)
        assert "hf_secret" not in said
    left = [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert left == []


IMPORTING = """
import importlib, pkgutil, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("connects:", event, arguments)

sys.addaudithook(watch)
import PIL.Image, huggingface_hub, pyarrow.parquet, tensorboard, ddpm_fast
for module in pkgutil.walk_packages(ddpm_fast.__path__, "ddpm_fast."):
    if module.name != "ddpm_fast.__main__" and ".kernels" not in module.name:
        importlib.import_module(module.name)
print(len(sys.modules) > 1000)
"""


@pytest.mark.slow
def test_importing_everything_connects_to_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.slow
def test_checking_connects_to_nothing(closed, trained, capsys):
    assert command(capsys, "check", trained)[0] == 0


@pytest.mark.parametrize("name", ["hf:../../etc", "hf:/etc/passwd", "hf:..", "hf:a/../b", "hf:a\nb", "hf:-x/.."])
def test_names_of_the_hub_that_climb_are_refused_before_anything_is_asked(name, closed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "hf:" in refused(capsys, "train", "--data", name, "--out", "run", *TINY)
    assert "hf:" in refused(capsys, "sample", name)
    assert "hf:" in refused(capsys, "convert", name, "dest")
    assert list(tmp_path.iterdir()) == []


def test_the_guard_of_the_network_sees_a_connection(closed, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AssertionError, match="a connection was asked for"):
        ddpm_fast.load("hf:someone/something")
