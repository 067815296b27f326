"""A configuration as values: nested dictionaries for JSON, and single fields by the names of their flags.

Imports nothing heavy, so that `ddpm-fast --help` answers at once.
"""

import dataclasses
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ddpm_fast.config import Config
from ddpm_fast.errors import flag, require, require_known, require_object

NO_FLAGS = "sampling"  # the part of a configuration whose fields no flag of train sets: they are a preset's


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dictionaries of plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Any) -> Config:
    """Rebuild a configuration from `to_dict`'s form.

    Raises:
        InputError: a key is unknown, a part is no dictionary, or a value is refused by its dataclass.
    """
    parts = {f.name: f.type for f in dataclasses.fields(Config) if isinstance(f.type, type) and f.type is not str}
    require_object("the configuration", values)
    for name in parts:
        require_object(f"configuration key {name!r}", values.get(name, {}))
    require(isinstance(values.get("preset", ""), str), "configuration key 'preset' is not text")
    return _part_from_dict(Config, {k: _part_from_dict(parts[k], v) if k in parts else v for k, v in values.items()})


def _part_from_dict(cls: type, values: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    require_known("configuration key", values, known)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def with_flags(config: Config, flags: Mapping[str, Any]) -> Config:
    """Return the configuration with fields of its parts replaced, by their names alone, as flags are.

    A list counts as a tuple and a path as its text.

    Raises:
        InputError: a name is unknown (the nearest is suggested), or a value is refused.
    """
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ("preset", NO_FLAGS)}
    known = [f.name for part in parts.values() for f in dataclasses.fields(part)]
    require_known("keyword", flags, known)
    for owner, part in parts.items():
        own = {f.name: plain(flags[f.name]) for f in dataclasses.fields(part) if f.name in flags}
        parts[owner] = dataclasses.replace(part, **own)
    return dataclasses.replace(config, **parts)


def plain(value: Any) -> Any:
    """Return a keyword's value as the field holds it: a path as text, a list as a tuple, NumPy's number as Python's."""
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:  # one of NumPy's numbers
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def changed_flags(base: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields that are flags in which two configurations differ, by name, with both values."""
    before, now = (_flat(to_dict(config)) for config in (base, other))
    return {name: (before[name], now[name]) for name in now if before[name] != now[name]}


def command_line(config: Config, base: Config, always: Collection[str]) -> str:
    """Return the command that trains a configuration, given that `base` is what its flags change.

    Args:
        config: what to train.
        base: which has the same preset and sampler.
        always: fields that are named even where they are as in the base.
    """
    named = {name for name in _flat(to_dict(config)) if name in always} | changed_flags(base, config).keys()
    flags = [_as_typed(name, value) for name, value in _flat(to_dict(config)).items() if name in named]
    return " ".join(["ddpm-fast train", *sorted(flags, key=lambda typed: not typed.startswith("--data"))])


def _as_typed(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    if isinstance(value, tuple):
        return " ".join([flag(name), *map(shlex.quote, map(str, value))])
    text = shlex.quote(str(value))
    return f"{flag(name)}={text}" if str(value).startswith("-") else f"{flag(name)} {text}"


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name != NO_FLAGS:
            fields |= value if isinstance(value, dict) else {name: value}
    return fields


def field_names(part: type) -> list[str]:
    """Return the names of a dataclass's fields, which are flags."""
    return [f.name for f in dataclasses.fields(part)]
