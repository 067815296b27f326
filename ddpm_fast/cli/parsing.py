"""Flags to dataclasses by tyro, whose boxed errors become one line; a misspelt flag is answered by the nearest."""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from ddpm_fast.config import SamplerConfig
from ddpm_fast.errors import InputError, flag, nearest
from ddpm_fast.flags import NO_FLAGS

T = TypeVar("T")

REWORDED = [
    (r"^Error parsing ", ""),
    (r"^(config\.\w+|start|\w+Arguments|\w+Options): ", ""),
    (r"^Missing value for argument '(\S+)'.*", r"\1 needs a value"),
    (r"^(\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 is \2: it must be a whole number"),
    (r"^(\S+): could not convert string to float: (.*)", r"\1 is \2: it must be a number"),
    (r"^(\S+): no type matching INT\|\{(\w+)\}.*\['(.*)'\]", r"\1 is '\3': it must be a whole number, or \2"),
    (r"^(\S+): Could not find valid parse for arguments: (.*)", r"\1 is \2: it must be whole numbers"),
    (r"^invalid choice (.*?) for argument '(\S+)'\. Expected one of \((.*)\)", r"\2 is \1: it must be one of \3"),
    (r"^Unrecognized options: (.*)", r"not understood: \1"),
]
"""tyro's sentences in the words of our own, see `errors.require_types`."""


BY_FLAGS = tyro.constructors.ConstructorRegistry()


@BY_FLAGS.struct_rule
def _keep_the_presets_sampler(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """Have no flags for a configuration's sampler, whose --steps would be another thing than training's."""
    return tyro.constructors.StructConstructorSpec(lambda: info.default, ()) if info.type is SamplerConfig else None


def flags_of(cls: Any) -> list[str]:
    """Return every flag name of a dataclass, nested parts flattened."""
    flags: list[str] = []
    for f in dataclasses.fields(cls):
        if f.name in ("run", "runs", "source", "dest", NO_FLAGS):  # what is named without a flag, or not at all
            continue
        value = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        flags += flags_of(type(value)) if dataclasses.is_dataclass(value) else [flag(f.name)]
    return flags


def _one_line(box: str) -> str:
    """Take the message, the first paragraph, out of tyro's boxed error; suggest the nearest valid choice."""
    # The box is drawn in Unicode or in ASCII, as the terminal allows; rules become empty lines.
    lines = [re.sub(r"^[-─+]{3,}$", "", line.strip("│|╭╮╰╯ ")) for line in box.splitlines()[1:]]
    message = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines)))
    for pattern, words in REWORDED:
        message = re.sub(pattern, words, message)
    message = (message or "the flags cannot be read").rstrip(".") + "."
    choice = re.search(r" is '(.*?)': it must be one of (.*)", message)
    return message + nearest(choice[1], re.findall(r"'(.*?)'", choice[2])) if choice else message.replace("?.", "?")


def refuse_unknown(cls: Any, arguments: Sequence[str], command: str) -> None:
    """Refuse what is no flag of a dataclass, and suggest the nearest.

    Raises:
        InputError: there is such a one.
    """
    flags = [*flags_of(cls), "--help"]
    known = [*flags, *(f"--no-{name[2:]}" for name in flags)]
    for argument in arguments:
        name = argument.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise InputError(f"unknown flag {name}.{nearest(name, known)} See ddpm-fast {command} --help")


def parse(cls: type[T], arguments: Sequence[str], default: T | None = None, command: str = "") -> T:
    """Parse flags into a dataclass.

    Raises:
        InputError: a flag or value is unknown; the nearest valid flag is suggested.
        SystemExit: --help was asked for.
    """
    refuse_unknown(cls, arguments, command)
    options: dict[str, Any] = {} if default is None else {"default": default}
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                cls, args=list(arguments), prog=f"ddpm-fast {command}", config=flat, registry=BY_FLAGS, **options
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{_one_line(errors.getvalue())} See ddpm-fast {command} --help") from None


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Return the value of a flag that must be known before the others are parsed."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def without(name: str, value: str, arguments: Sequence[str]) -> list[str]:
    """Leave out a flag where it has this value, which its field cannot hold."""
    kept = list[str]()
    for argument in arguments:
        if kept and argument == value and kept[-1].replace("_", "-") == name:
            kept.pop()
        elif argument.replace("_", "-") != f"{name}={value}":
            kept.append(argument)
    return kept


def own_flags(cls: Any, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the flags of a dataclass, with their values, from all others."""
    own, others = list[str](), list[str]()
    names = (*flags_of(cls), "-h", "--help")
    target = others
    for argument in arguments:
        if argument.startswith("-") and not _is_number(argument):
            target = own if argument.split("=")[0].replace("_", "-") in names else others
        target.append(argument)
    return own, others


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False
