"""--config FILE.toml: flags that are written down are put beside those that are given, as if they had been typed.

preset = "mnist"
batch_size = 64

[unet]
channels = 32
"""

import dataclasses
import functools
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from ddpm_fast.cli.arguments import TrainArguments
from ddpm_fast.cli.parsing import flags_of, value_of
from ddpm_fast.errors import InputError, flag, nearest, require
from ddpm_fast.flags import NO_FLAGS

T = TypeVar("T")
Parts = dict[str, dict[str, Any]]
"""The type of each flag, by its Python name, by the part that it belongs to; "" is the file's top."""
OWN_FIELD = "file"
"""The part that --config itself belongs to, which no file names."""


def reading_file(cls: Any) -> Callable[[Callable[[Sequence[str]], T]], Callable[[Sequence[str]], T]]:
    """Let a parser of a dataclass's flags read --config; errors name the file where they are about a flag of it.

    A file may hold any flag of train: what another command has no use for is left out.
    """

    def reading(parse: Callable[[Sequence[str]], T]) -> Callable[[Sequence[str]], T]:
        @functools.wraps(parse)
        def parse_with_file(arguments: Sequence[str]) -> T:
            file = value_of("--config", arguments)
            if not file:
                return parse(arguments)
            flags, own = _read(Path(file), _parts(TrainArguments)), flags_of(cls)
            written = {name: typed for name, typed in flags.items() if not _is_given(name, arguments)}
            try:
                return parse([*arguments, *(word for name in written if flag(name) in own for word in written[name])])
            except InputError as error:
                about = re.match(r"(?:unknown )?(?:--)?([\w-]+)", str(error))  # --steps is 0, unknown preset 'mnits'
                of_file = about is not None and about[1].replace("-", "_") in written
                raise (InputError(f"{file}: {error}") if of_file else error) from None

        return parse_with_file

    return reading


def _parts(cls: Any) -> Parts:
    parts: Parts = {"": {}}
    for f in dataclasses.fields(cls):
        value = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(value) and f.name == "config":
            parts |= {name: kinds for name, kinds in _parts(type(value)).items() if name}
            parts[""]["preset"] = str
        elif dataclasses.is_dataclass(value) and f.name not in (OWN_FIELD, NO_FLAGS):
            parts[f.name] = {each.name: each.type for each in dataclasses.fields(value)}
    return parts


def _is_given(name: str, arguments: Sequence[str]) -> bool:
    given = {argument.split("=")[0].replace("_", "-") for argument in arguments}
    return flag(name) in given or flag(f"no_{name}") in given


def _read(file: Path, parts: Parts) -> dict[str, list[str]]:
    """Return a file's flags as they would be typed, by their Python names.

    Raises:
        InputError: the file is missing or no TOML, or a key is unknown, in another part, there twice, or no value.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"is not readable TOML ({error})"
        raise InputError(f"--config {file} {why}: name a TOML file of flags by their Python names") from None
    home = {name: part for part, kinds in parts.items() for name in kinds}
    flags = dict[str, list[str]]()
    for key, value in values.items():
        if isinstance(value, dict):
            require(key in parts and key != "", f"{file}: unknown part [{key}].{nearest(key, parts)}")
        for name, each in value.items() if isinstance(value, dict) else [(key, value)]:
            where = f"[{key}] {name}" if isinstance(value, dict) else name
            known = parts[key] if isinstance(value, dict) else home
            if name not in known:
                other = f" It belongs to [{home[name]}]." if home.get(name) else nearest(name, known)
                raise InputError(f"{file}: unknown key {where!r}.{other}")
            require(name not in flags, f"{file}: {name!r} is there twice, flat and in a part: leave one out")
            flags[name] = _typed(file, name, each, parts[home[name]][name])
    return flags


def _typed(file: Path, name: str, value: Any, kind: Any) -> list[str]:
    """Return a flag and its value as they would be typed.

    Raises:
        InputError: the value is of no kind that the flag could take.
    """
    wanted = "true or false" if kind is bool else "a list" if get_origin(kind) is tuple else "a number or text"
    fits = {"true or false": bool, "a list": list}.get(wanted, (int, float, str))
    right = isinstance(value, fits) and (kind is bool or not isinstance(value, bool))
    require(right, f"{file}: {name} is {value!r}: it must be {wanted}")
    if kind is bool:
        return [flag(name if value else f"no_{name}")]
    if isinstance(value, list):
        return [flag(name), *map(str, value)]
    return [f"{flag(name)}={value}"]
