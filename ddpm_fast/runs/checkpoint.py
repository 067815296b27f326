"""Checkpoints: whole or not at all, equal states as equal bytes, and nothing in them is ever unpickled.

    checkpoints/step-0005000/   model.safetensors ema.safetensors optimizer.safetensors state.json
    checkpoints/latest          the name of the newest whole checkpoint

A checkpoint is written into a temporary directory, synced, and renamed into place. It carries its configuration:
ema.safetensors and state.json are all that sampling needs, wherever they are copied to; resuming needs all four files.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ddpm_fast.config import Config
from ddpm_fast.errors import InputError
from ddpm_fast.files import replace_file, whole, write_synced
from ddpm_fast.flags import from_dict, to_dict

FORMAT = "ddpm-fast checkpoint 1"
TENSOR_FILES = ("model", "ema", "optimizer")
"""What resuming needs."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk; tensors are read when asked for."""

    path: Path
    step: int
    config: Config
    fingerprint: str
    """Of the data set that the run trains on."""

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Read one of "model", "ema", "optimizer": names to CPU tensors.

        Raises:
            InputError: the file is missing, truncated or foreign.
        """
        file = self.path / f"{part}.safetensors"
        try:
            return safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(_unreadable(file, error)) from None


def path_of(run: Path, step: int) -> Path:
    """Return where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:07d}"


def to_json(value: Any) -> bytes:
    """Serialise to indented JSON with a final newline."""
    return (json.dumps(value, indent=2) + "\n").encode()


def save(run: Path, step: int, config: Config, fingerprint: str, parts: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a checkpoint of a run and make it the newest.

    Args:
        run: the run directory.
        step: optimizer steps taken.
        config: the run's configuration.
        fingerprint: the data set's.
        parts: for each of `TENSOR_FILES`, names to tensors.

    Raises:
        InputError: it cannot be written; nothing is left behind, and older checkpoints stay.
    """
    directory, path = run / "checkpoints", path_of(run, step)
    for left_over in directory.glob(".step-*"):  # by a run that was killed while it saved
        shutil.rmtree(left_over, ignore_errors=True)
    state = {"format": FORMAT, "step": step, "fingerprint": fingerprint, "config": to_dict(config)}
    with whole(path) as temporary:
        temporary.mkdir()
        for part in TENSOR_FILES:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts[part].items()}
            write_synced(temporary / f"{part}.safetensors", safetensors.torch.save(tensors))
        write_synced(temporary / "state.json", to_json(state))
    replace_file(directory / "latest", f"{path.name}\n".encode())
    return path


def _unreadable(path: Path, error: Exception) -> str:
    with contextlib.suppress(OSError):
        head = path.read_bytes()[:2]
        if head[:1] == b"\x80" or head == b"PK":
            return f"{path} is a pickle (a PyTorch .pt/.ckpt file): it could run any code, so it is never loaded"
    if not path.exists():
        return f"{path} is missing: copy it from the run, or use another checkpoint"
    return f"{path} is truncated or not a ddpm-fast checkpoint ({str(error).splitlines()[0]}): use another one"


def read(path: Path, parts: Sequence[str] = TENSOR_FILES) -> Checkpoint:
    """Open a checkpoint directory of which only some parts are needed.

    Raises:
        InputError: it is missing, foreign, lacks a part, or holds a configuration that this version refuses.
    """
    file = path / "state.json"
    try:
        state = json.loads(file.read_text())
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        found = Checkpoint(path, int(state["step"]), from_dict(state["config"]), str(state["fingerprint"]))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(_unreadable(file, error)) from None
    for part in parts:
        _check_complete(path / f"{part}.safetensors")
    return found


def _check_complete(file: Path) -> None:
    """Refuse a file whose header does not describe exactly its bytes, without reading the tensors."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            opened.keys()
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(_unreadable(file, error)) from None


def newest_first(run: Path, parts: Sequence[str] = TENSOR_FILES) -> Iterator[Checkpoint]:
    """Yield the checkpoints of a run whose parts are whole: `latest` first, then by step."""
    directory = run / "checkpoints"
    names = sorted((entry.name for entry in directory.glob("step-*")), reverse=True)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        names.insert(0, (directory / "latest").read_text().strip())
    for name in names:
        with contextlib.suppress(InputError):
            yield read(directory / name, parts)


def newest(run: Path, parts: Sequence[str] = TENSOR_FILES) -> Checkpoint | None:
    """Return the newest checkpoint of a run whose parts are whole, or None."""
    return next(newest_first(run, parts), None)


def run_of(path: Path) -> Path:
    """Return the run that a checkpoint lies in, or itself where it was copied elsewhere."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def resolve(path: Path, parts: Sequence[str] = TENSOR_FILES) -> Checkpoint:
    """Find the checkpoint that RUN_OR_CHECKPOINT means, of which only some parts are needed.

    Raises:
        InputError: there is none; a file (a pickle, say) is refused by what it is.
    """
    if path.is_file():
        raise InputError(_unreadable(path, ValueError("a file; name a run directory or one of its checkpoints/step-*")))
    if not path.is_dir():
        raise InputError(f"{path} does not exist: name a run directory or one of its checkpoints/step-*")
    if (path / "state.json").exists():
        return read(path, parts)
    found = newest(path, parts)
    if found is not None:
        return found
    names = sorted(entry.name for entry in (path / "checkpoints").glob("step-*"))
    if names:
        return read(path / "checkpoints" / names[-1], parts)  # raises, saying what is wrong with it
    raise InputError(f"{path} holds no checkpoint: name a run directory or one of its checkpoints/step-*")
