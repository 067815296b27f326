"""What is refused: the errors, the checks of values that raise them, and the name that was probably meant."""

import dataclasses
import difflib
import reprlib
import sys
from collections.abc import Collection, Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

MEANT = {
    "amp": "precision",
    "batch": "batch-size",
    "beta2": "adam-beta2",
    "beta-schedule": "schedule",
    "checkpoint-every": "save-every",
    "dim": "channels",
    "cfg": "guidance",
    "cfg-scale": "guidance",
    "class": "label",
    "class-dropout": "label-dropout",
    "class-label": "label",
    "classes": "num-classes",
    "cond-drop-prob": "label-dropout",
    "dpm": "dpm++",
    "dpm-solver": "dpm++",
    "dpm-solver++": "dpm++",
    "dim-mults": "channel-multipliers",
    "dataset": "data",
    "data-dir": "data",
    "ema": "ema-decay",
    "epochs": "steps",
    "bfloat16": "bf16",
    "float32": "fp32",
    "fp16": "bf16",
    "gpu": "device cuda",
    "gpus": "device",
    "grad-accum": "accumulate",
    "gradient-accumulation-steps": "accumulate",
    "grad-clip": "clip-norm",
    "guidance-scale": "guidance",
    "image-size": "height",
    "iterations": "steps",
    "labels": "label",
    "lr": "learning-rate",
    "lr-warmup-steps": "warmup-steps",
    "max-grad-norm": "clip-norm",
    "max-iters": "steps",
    "max-steps": "steps",
    "mixed-precision": "precision",
    "model-channels": "channels",
    "noise-schedule": "schedule",
    "num-class-embeds": "num-classes",
    "num-channels": "channels",
    "num-images": "count",
    "num-inference-steps": "steps",
    "num-res-blocks": "res-blocks",
    "num-samples": "count",
    "num-train-timesteps": "timesteps",
    "objective": "prediction",
    "output-dir": "out",
    "prediction-type": "prediction",
    "random-flip": "flip",
    "resolution": "height",
    "resume-from-checkpoint": "resume",
    "train-batch-size": "batch-size",
    "train-data-dir": "data",
    "warmup": "warmup-steps",
}
"""What other trainers call ours; where a name is a flag's or a value's, both are named."""
CLOSE = 0.7
"""Share of letters that a misspelt name has in common with what was meant; shorter ones match by chance below it."""
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class InputError(ValueError):
    """The user's input or request cannot be used: one line, exit status 2."""


class NotEnoughMemoryError(InputError):
    """A device's memory does not suffice for what was asked."""


class MathematicsError(RuntimeError):
    """A check failed or a value was not finite: exit status 3."""


def flag(name: str) -> str:
    """Return the command line's name for a field, which all messages use."""
    return f"--{name.replace('_', '-')}"


def printable(text: str) -> str:
    """Return a text with a question mark in the place of each character that is not printed as one."""
    return "".join(c if c.isprintable() else "?" for c in text)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse a name that is not known, and suggest the nearest."""
    for name in names:
        require(name in known, f"unknown {what} {name!r}.{nearest(name, known)}")


def require_object(what: str, value: Any) -> None:
    require(isinstance(value, dict), f"{what} is {reprlib.repr(value)}, not an object")


def require_types(part: Any) -> None:
    """Refuse values of a wrong type, which Python and JSON let through."""
    for f in dataclasses.fields(part):
        value, kind = getattr(part, f.name), f.type
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        is_value = f"{flag(f.name)} is {reprlib.repr(value)}"
        if get_origin(kind) in (Union, UnionType):  # of a number and words
            kind, words = get_args(kind)
            if isinstance(value, str):
                require(value in get_args(words), f"{is_value}: it must be {_KINDS[kind]}, or {get_args(words)[0]}")
                continue
        if get_origin(kind) is Literal:
            _require_choice(is_value, value, get_args(kind))
        elif get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
            require(isinstance(value, tuple), f"{is_value}: it must be a list")
            for entry in value:
                _require_choice(f"{flag(f.name)} has {entry!r}", entry, get_args(get_args(kind)[0]))
        elif get_origin(kind) is tuple:
            whole = isinstance(value, tuple) and all(type(entry) is int for entry in value)
            require(whole, f"{is_value}: it must be whole numbers")
        else:
            fits = type(value) is kind or (kind is float and type(value) is int)
            require(fits, f"{is_value}: it must be {_KINDS[kind]}")
            finite = kind is not float or abs(value) <= sys.float_info.max  # of whole numbers, too, which JSON may hold
            require(finite, f"{is_value}: it must be finite")


def _require_choice(is_value: str, value: Any, choices: tuple[str, ...]) -> None:
    wanted = f"it must be one of {', '.join(map(repr, choices))}"
    require(value in choices, f"{is_value}: {wanted}.{nearest(str(value), choices)}")


def require_counts(part: Any, *names: str, most: int) -> None:
    """Refuse a field that is less than 1, or more than anything could need: memory or time would not suffice for it."""
    for name in names:
        value = getattr(part, name)
        require(value > 0, f"{flag(name)} is {value}: it must be at least 1")
        require(value <= most, f"{flag(name)} is {value}: it must be at most {most}")


def require_seed(seed: int) -> None:
    require(0 <= seed < 2**64, f"--seed is {seed}: it must lie in 0..2**64-1")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name that is meant or close, or "" when none is.

    Names are compared without leading dashes, which all flags share; capitals do not count, and _ is -.
    """
    plain = {_plain(entry): entry for entry in known}
    meant = [entry for entry in MEANT.get(_plain(name), "").split() if entry in plain]
    close = difflib.get_close_matches(_plain(name), plain, n=max(1, len(plain)), cutoff=CLOSE)
    exchanged = [entry for entry in close if sorted(entry) == sorted(_plain(name))]  # ddmi is ddim, and not ddpm
    matches = meant or exchanged or close
    return f" Did you mean {plain[matches[0]]!r}?" if matches else ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()
