"""The command line: flags to configurations, errors to one line, and an exit status that says what happened.

0 done; 2 the user's input or request; 3 the mathematics is wrong; 130 and 143 interrupted, after saving; 1 a bug,
with its traceback. torch is imported only once a command runs, so that --help answers at once.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from ddpm_fast.cli.arguments import CheckArguments, SampleArguments, TrainArguments
from ddpm_fast.errors import InputError, MathematicsError, nearest
from ddpm_fast.presets import preset

T = TypeVar("T")

USAGE = """usage: ddpm-fast COMMAND [flags]

Train and sample denoising diffusion models (DDPM, Ho et al. 2020).

commands:
  train    train a U-Net; with no flags: on built-in handwritten digits, in minutes on a CPU
  sample   make images from a run or a checkpoint
  check    is the mathematics right, here, now

`ddpm-fast COMMAND --help` explains every flag with its unit and default."""


def _flags_of(cls: Any) -> list[str]:
    """Return every flag name of a dataclass, nested parts flattened."""
    flags: list[str] = []
    for f in dataclasses.fields(cls):
        value = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        flags += _flags_of(type(value)) if dataclasses.is_dataclass(value) else [f"--{f.name.replace('_', '-')}"]
    return flags


def _one_line(box: str) -> str:
    """Take the message, the first paragraph, out of tyro's boxed error; suggest the nearest valid choice."""
    # The box is drawn in Unicode or in ASCII, as the terminal allows; rules become empty lines.
    lines = [re.sub(r"^[-─+]{3,}$", "", line.strip("│|╭╮╰╯ ")) for line in box.splitlines()[1:]]
    message = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines)))
    message = re.sub(r"^Error parsing |^config\.\w+: |^\w+Arguments: ", "", message)
    message = re.sub(r"^Missing from .*?: ", "missing ", message)
    choice = re.match(r"invalid choice '(.*?)' .*? one of \((.*)\)", message)
    if choice:
        message += nearest(choice[1], re.findall(r"'(.*?)'", choice[2]))
    return message.rstrip(".") + "." if message else "the flags cannot be read."


def parse(cls: type[T], arguments: Sequence[str], default: T | None = None, command: str = "") -> T:
    """Parse flags into a dataclass.

    Raises:
        InputError: a flag or value is unknown; the nearest valid flag is suggested.
        SystemExit: --help was asked for.
    """
    known = [*_flags_of(cls), "--help"]
    for argument in arguments:
        name = argument.split("=")[0].replace("_", "-")
        negated = "--" + name.removeprefix("--no-")
        if name.startswith("--") and name not in known and negated not in known:
            raise InputError(f"unknown flag {name}.{nearest(name, known)} See ddpm-fast {command} --help")
    options: dict[str, Any] = {} if default is None else {"default": default}
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(cls, args=list(arguments), prog=f"ddpm-fast {command}", config=flat, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{_one_line(errors.getvalue())} See ddpm-fast {command} --help") from None


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Return the value of a flag that must be known before the others are parsed."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def parse_train(arguments: Sequence[str]) -> TrainArguments:
    """Parse train's flags over the preset's defaults or, on --resume, over the run's own configuration."""
    default = preset(_value_of("--preset", arguments) or "digits")
    out = _value_of("--out", arguments)
    if "--resume" in arguments:
        if out is None:
            raise InputError("--resume needs --out: name the run directory to continue")
        from ddpm_fast.runs.run import read_config

        found = read_config(Path(out))
        default = found[0] if found else default
    return parse(TrainArguments, arguments, TrainArguments(config=default), "train")


def parse_check(arguments: Sequence[str]) -> CheckArguments:
    """Parse check's flags over the preset's defaults."""
    default = preset(_value_of("--preset", arguments) or "digits")
    return parse(CheckArguments, arguments, CheckArguments(config=default), "check")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # The commands import torch; they live behind the parser so that errors and --help come first.
    commands: dict[str, Callable[[list[str]], int]] = {"train": _train, "sample": _sample, "check": _check}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    try:
        if arguments[0] not in commands:
            raise InputError(
                f"unknown command {arguments[0]!r}: the commands are {', '.join(commands)}."
                f"{nearest(arguments[0], commands)}"
            )
        sys.exit(commands[arguments[0]](arguments[1:]))
    except InputError as error:
        _say_and_exit(error, 2)
    except MathematicsError as error:
        _say_and_exit(error, 3)
    except KeyboardInterrupt:
        _say_and_exit("interrupted before anything was to be saved", 130)


def _say_and_exit(message: object, status: int) -> NoReturn:
    print(f"ddpm-fast: {message}", file=sys.stderr)
    sys.exit(status)


def _train(arguments: list[str]) -> int:
    parsed = parse_train(arguments)
    from ddpm_fast.cli.commands import train

    return train(parsed.config, parsed.out, parsed.resume)


def _sample(arguments: list[str]) -> int:
    parsed = parse(SampleArguments, arguments, command="sample")
    from ddpm_fast.cli.commands import sample

    return sample(parsed)


def _check(arguments: list[str]) -> int:
    parsed = parse_check(arguments)
    from ddpm_fast.cli.commands import check

    return check(parsed.config, parsed.run)
