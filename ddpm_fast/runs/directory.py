"""A run's directory: its configuration and metrics on disk, and from where a run starts in it.

runs/NAME/
  config.json       the resolved configuration, versions, the data's fingerprint and place, and what was decided of
                    threads and device
  metrics.jsonl     one line per logging interval
  evaluation/       what the network was off at each address, see `evaluation`
  quality/          see `scores`
  samples/          normalized and raw grids; data.png, what the network is trained on
  checkpoints/      see `checkpoint`
  origin/           the code and the command that made it, see `origin`
  tensorboard/      the same metrics and grids for TensorBoard
  .lock             while it is trained, see `lock`
"""

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddpm_fast import __version__
from ddpm_fast.config import MAY_CHANGE, Config
from ddpm_fast.errors import InputError, flag
from ddpm_fast.files import clear_left_overs, parse_json, replace_file, writing
from ddpm_fast.flags import changed_flags, from_dict, to_dict
from ddpm_fast.runs import checkpoint, evaluation, grids, lock


def read_config(run: Path) -> tuple[Config, str] | None:
    """Return a run's configuration and data fingerprint; None when config.json is missing or torn.

    Raises:
        InputError: it is whole, but no run's, or holds what this version does not know.
    """
    file = run / "config.json"
    try:
        values = parse_json(file.read_text())
    except (OSError, ValueError):
        return None
    try:
        return from_dict(values["config"]), str(values["fingerprint"])
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (KeyError, TypeError):
        raise InputError(
            f"{file} is no run's: it lacks a configuration or its data's fingerprint; put the run's own back, or name "
            "another directory"
        ) from None


def holds_run(run: Path) -> bool:
    """Return whether a directory holds a run, whole or damaged."""
    return (run / "config.json").exists() or bool(checkpoint.steps_saved(run))


def recorded(run: Path) -> tuple[Config, str]:
    """Return the configuration and data fingerprint of a run that is to be continued.

    They are config.json's; where that is missing or torn, the newest checkpoint's.

    Raises:
        InputError: there is no run, or neither can be read.
    """
    if not holds_run(run):
        why = "holds no run" if run.exists() else "does not exist"
        raise InputError(
            f"--out {run} {why}: name the run to continue, or leave --resume out to start one there; "
            "--resume-or-start does what is possible"
        )
    found = read_config(run)
    if found is not None:
        return found
    for step in checkpoint.steps_saved(run)[:1]:
        newest = checkpoint.newest(run, ()) or checkpoint.read(checkpoint.path_of(run, step), ())  # says what is wrong
        parts = [part for part in checkpoint.TENSOR_FILES if (newest.path / f"{part}.safetensors").exists()]
        if parts == ["ema"]:
            alone = "holds averaged weights alone, which cannot be continued"
            raise InputError(f"{newest.path} {alone}: start another run from them by --init {run}")
        return newest.config, newest.fingerprint
    raise InputError(
        f"{run / 'config.json'} is torn, and there is no checkpoint to take the configuration from: name another --out"
    )


def where_data_is(run: Path, config: Config) -> Config:
    """Return a recorded configuration with --data as it is found from here.

    That is where it was named, seen from the directory of today; if nothing is there, where it was when the run began.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        path = parse_json((run / "config.json").read_text())["data_path"]
        if not Path(config.data.data).exists():
            return replace(config, data=replace(config.data, data=str(path)))
    return config


def check_resumable(run: Path, config: Config, fingerprint: str) -> None:
    """Refuse to continue a run as another one: --steps may be raised, and what is in `MAY_CHANGE` may change.

    The data may have moved: it is known by its fingerprint.

    Raises:
        InputError: there is no run, or a flag or the data differ from the run's.
    """
    saved, saved_fingerprint = recorded(run)
    steps = config.training.steps
    changed = {name: values for name, values in changed_flags(saved, config).items() if name not in MAY_CHANGE}
    if changed:
        differing = [f"{flag(name)} {before} -> {asked}" for name, (before, asked) in changed.items()]
        raise InputError(
            f"{run} was started otherwise ({'; '.join(differing)}): leave the flag out, or use another --out"
        )
    if steps < saved.training.steps:
        raise InputError(f"{run} was started with --steps {saved.training.steps}: ask for as many or more, not {steps}")
    if fingerprint != saved_fingerprint:
        raise InputError(
            f"{run} was trained on other data (fingerprint {saved_fingerprint[:12]}, now {fingerprint[:12]}): name "
            "that by --data, wherever it is now, or use another --out"
        )


def _before_cooldown(run: Path, config: Config) -> checkpoint.Checkpoint | None:
    """Return the newest whole checkpoint of a rate that had not begun to fall, or fell towards the same last step.

    None where there is no checkpoint at all. What is damaged is passed over, saying so.

    Raises:
        InputError: there are only others.
    """
    others, damaged = list[checkpoint.Checkpoint](), list[str]()
    for found in checkpoint.newest_first(run, damaged=damaged):
        before = found.config.training
        if found.step > before.cooldown_start and before.steps != config.training.steps:
            others.append(found)
            continue
        try:
            found.verify()
        except InputError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            print(f"passed over: {reason}")
        return found
    if others and (start := others[0].config.training.cooldown_start) > 0:
        raise InputError(
            f"{checkpoint.path_of(run, start)} is missing or damaged: --steps {config.training.steps} continues from "
            f"where the learning rate had not begun to fall; put it back, ask for --steps "
            f"{others[0].config.training.steps}, or train anew in another --out"
        )
    if damaged and not others:
        raise InputError(f"{damaged[0]}; no other checkpoint of {run} is whole")
    return None


def find_start(run: Path, config: Config, fingerprint: str, resume: bool) -> checkpoint.Checkpoint | None:
    """Decide, without writing anything, where a run starts.

    Returns:
        The checkpoint to continue from, or None to start at step 0: the newest whole one that has seen the learning
        rates which the configuration asks for. With more --steps than before that is one from before the old cooldown.

    Raises:
        InputError: the directory holds anything and is not resumed, belongs to another run, or lacks such a checkpoint.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"--out {run} is a file: name a directory that does not exist yet")
    if not resume:
        if run.exists() and any(not _is_left_over(entry.name) for entry in run.iterdir()):
            raise InputError(f"--out {run} exists and is not empty: add --resume to continue it, or name another")
        return None
    check_resumable(run, config, fingerprint)
    found = _before_cooldown(run, config)
    if found is not None and found.fingerprint != fingerprint:
        raise InputError(f"{found.path} was trained on other data than {config.data.data}: use another --out")
    return found


def _is_left_over(name: str) -> bool:
    """Return whether a file is our own, of a run that was killed before it was one."""
    return name == lock.NAME or (name.startswith(".config.") and ".tmp" in name)


def prepare(run: Path, config: Config, fingerprint: str, step: int, decided: Mapping[str, Any] | None = None) -> None:
    """Make the run directory, and cut metrics, evaluations and grids back to the step that the run starts from.

    Args:
        run: the directory.
        config: the run's.
        fingerprint: of its data.
        step: that it starts from.
        decided: how it computes, see `decisions`.

    Raises:
        InputError: it cannot be written.
    """
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        for place in (".", "checkpoints", "evaluation", "samples", "origin"):
            clear_left_overs(run / place)
        versions = {"ddpm-fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
        values: dict[str, Any] = {"fingerprint": fingerprint, "versions": versions}
        values |= {"decided": decided} if decided else {}
        data = Path(config.data.data)
        values |= {"data_path": str(data.absolute())} if config.data.data != "digits" and data.exists() else {}
        values |= {"config": to_dict(config)}
        replace_file(run / "config.json", checkpoint.to_json(values))
        _cut_metrics(run / "metrics.jsonl", step)
        evaluation.cut_back(run, step)
        grids.cut_back(run, step)


def _metrics_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of metrics.jsonl with what they say; a torn or damaged one is left out."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):  # a ValueError, too, if not UTF-8
            values = parse_json(line)
            if type(values["step"]) is int and all(map(_is_of_numbers, map(values.get, ("wall", "quality")))):
                yield line.decode(), values  # another line is none of ours


def _is_of_numbers(part: Any) -> bool:
    numbers = isinstance(part, dict) and all(isinstance(value, int | float) for value in part.values())
    return part is None or numbers


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return a run's metrics: what was logged with "step", "loss" and more, one dictionary per logging interval."""
    return [values for _, values in _metrics_lines(run / "metrics.jsonl")]


def amend_last_metrics(run: Path, values: dict[str, Any]) -> None:
    """Add to the last line of a run's metrics what was found out after it was written."""
    *lines, (_, last) = _metrics_lines(run / "metrics.jsonl")
    text = "".join(f"{line}\n" for line in [*(line for line, _ in lines), json.dumps(last | values)])
    replace_file(run / "metrics.jsonl", text.encode())


def _cut_metrics(path: Path, step: int) -> None:
    """Drop, whole or not at all, the lines after a checkpoint's step and a torn last one."""
    if path.exists():
        kept = [line for line, values in _metrics_lines(path) if values["step"] <= step]
        replace_file(path, "".join(f"{line}\n" for line in kept).encode())
