"""Checkpoints: whole or not at all, equal states as equal bytes, and nothing in them is ever unpickled.

    checkpoints/step-0005000/   model.safetensors ema.safetensors optimizer.safetensors state.json
    checkpoints/latest          the name of the newest whole checkpoint

A checkpoint is written into a temporary directory, synced, and renamed into place. It carries its configuration:
ema.safetensors and state.json are all that sampling needs, wherever they are copied to; resuming needs all four files.
state.json holds a digest of each of the others, and of itself: a file with a flipped bit is refused by its name.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ddpm_fast.config import Config
from ddpm_fast.errors import InputError
from ddpm_fast.files import parse_json, replace_file, whole, write_synced
from ddpm_fast.flags import from_dict, to_dict

FORMAT, FORMAT_WITHOUT_DIGESTS = "ddpm-fast checkpoint 2", "ddpm-fast checkpoint 1"
TENSOR_FILES = ("model", "ema", "optimizer")
"""What resuming needs."""
DAMAGED = "it is damaged, its bytes do not give the digest that was saved with them: use another checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk; tensors are read when asked for."""

    path: Path
    step: int
    config: Config
    fingerprint: str
    """Of the data set that the run trains on."""
    digests: Mapping[str, str]
    """Of each part's file, by part; of a checkpoint of the first format, which had none, none."""
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    def files(self, part: str) -> list[Path]:
        """Return the files that decide what a part's weights make."""
        return [self.path / f"{part}.safetensors", self.path / "state.json"]

    def verify(self, parts: Sequence[str] = TENSOR_FILES) -> None:
        """Read the files of parts, once, and hold their bytes to their digests.

        Raises:
            InputError: a file is missing, truncated, foreign or damaged.
        """
        for part in parts:
            if part in self.digests and part not in self._verified:
                file = self.path / f"{part}.safetensors"
                try:
                    with file.open("rb") as opened:
                        found = hashlib.file_digest(opened, _blake2).hexdigest()
                except OSError as error:
                    raise InputError(_unreadable(file, error)) from None
                if found != self.digests[part]:
                    _check_complete(file)  # which knows better what is wrong, where it is
                    raise InputError(f"{file}: {DAMAGED}")
                self._verified.add(part)

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Read one of "model", "ema", "optimizer": names to CPU tensors.

        Raises:
            InputError: the file is missing, truncated, foreign or damaged.
        """
        self.verify((part,))
        file = self.path / f"{part}.safetensors"
        try:
            return safetensors.torch.load_file(file)  # mapped: what was just read is not read from the disk again
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(_unreadable(file, error)) from None


def _blake2(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=32)


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
        parts: for each of `TENSOR_FILES`, or of those that there are, names to tensors.

    Raises:
        InputError: it cannot be written; nothing is left behind, and older checkpoints stay.
    """
    directory, path = run / "checkpoints", path_of(run, step)
    for left_over in directory.glob(".step-*"):  # by a run that was killed while it saved
        shutil.rmtree(left_over, ignore_errors=True)
    digests = dict[str, str]()
    with whole(path) as temporary:
        temporary.mkdir()
        for part, named in parts.items():
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            data = safetensors.torch.save(tensors)
            digests[part] = _blake2(data).hexdigest()
            write_synced(temporary / f"{part}.safetensors", data)
        state = {"format": FORMAT, "step": step, "fingerprint": fingerprint, "config": to_dict(config)}
        write_synced(temporary / "state.json", _sealed(state | {"digests": digests}))
    replace_file(directory / "latest", f"{path.name}\n".encode())
    return path


def _sealed(state: Mapping[str, Any]) -> bytes:
    """Serialise a state with a digest of all that it says."""
    return to_json({**state, "digest": _blake2(to_json(state)).hexdigest()})


def _unsealed(data: bytes) -> dict[str, Any]:
    """Return what state.json says.

    Raises:
        ValueError: it is none.
        InputError: it is damaged.
    """
    state = parse_json(data)
    formats = (FORMAT, FORMAT_WITHOUT_DIGESTS)
    if not isinstance(state, dict) or state.get("format") not in formats:
        raise ValueError(f"its format is not {FORMAT!r}")
    if state["format"] == FORMAT and data != _sealed({name: state[name] for name in state if name != "digest"}):
        raise InputError(DAMAGED)
    return state


def _unreadable(path: Path, error: Exception) -> str:
    with contextlib.suppress(OSError, ValueError):  # the latter of a name that no file can have
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
        state = _unsealed(file.read_bytes())
        config, digests = from_dict(state["config"]), dict(state.get("digests", {}))
        found = Checkpoint(path, int(state["step"]), config, str(state["fingerprint"]), digests)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
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


def steps_saved(run: Path) -> list[int]:
    """Return the steps of which a run has a checkpoint, whole or damaged, the last first."""
    steps = []
    for entry in (run / "checkpoints").glob("step-*"):
        with contextlib.suppress(ValueError):
            steps.append(int(entry.name.removeprefix("step-")))
    return sorted(steps, reverse=True)


def newest_first(
    run: Path, parts: Sequence[str] = TENSOR_FILES, damaged: list[str] | None = None
) -> Iterator[Checkpoint]:
    """Yield the checkpoints of a run whose parts are there, the newest first.

    That is by step: `latest` is written after its checkpoint, and a run may be killed in between. But a run that goes
    on for more steps from before its cooldown leaves older checkpoints of later steps: they come last.

    Args:
        run: the run directory.
        parts: what is needed of a checkpoint. Their bytes are left for `Checkpoint.verify` to read.
        damaged: gets a sentence about each that is passed over.
    """
    left, outdated = None, list[Checkpoint]()
    with contextlib.suppress(OSError, ValueError):
        left = read(run / "checkpoints" / Path((run / "checkpoints/latest").read_text().strip()).name, ())
    for step in steps_saved(run):
        try:
            found = read(path_of(run, step), parts)
        except InputError as error:
            if damaged is not None:
                damaged.append(str(error))
            continue
        if left is not None and step > left.step and found.config.training.steps != left.config.training.steps:
            outdated.append(found)
        else:
            yield found
    yield from outdated


def newest(run: Path, parts: Sequence[str] = TENSOR_FILES) -> Checkpoint | None:
    """Return the newest checkpoint of a run whose parts are there, or None."""
    return next(newest_first(run, parts), None)


def newest_whole(run: Path, parts: Sequence[str] = TENSOR_FILES) -> Checkpoint | None:
    """Return the newest checkpoint of a run whose parts are whole, bit for bit; say what is passed over.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    damaged = list[str]()
    for found in newest_first(run, parts, damaged):
        try:
            found.verify(parts)
        except InputError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            print(f"passed over: {reason}", file=sys.stderr)
        if damaged:
            print(f"{run}: taking step {found.step}, the newest whole checkpoint", file=sys.stderr)
        return found
    if damaged:
        raise InputError(damaged[0])
    return None


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
    found = newest_whole(path, parts)
    if found is not None:
        return found
    raise InputError(f"{path} holds no checkpoint: name a run directory or one of its checkpoints/step-*")
