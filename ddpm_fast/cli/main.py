"""The command line: flags to configurations, errors to one line, and an exit status that says what happened.

0 done; 2 the user's input or request; 3 the mathematics is wrong; 130 and 143 interrupted, after saving; 141 nobody
reads the output any more; 1 a bug, with its traceback. torch is imported only once a command runs, so that --help
answers at once.
"""

import contextlib
import errno
import gc
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

import tyro

from ddpm_fast import __version__
from ddpm_fast.cli.arguments import (
    CheckArguments,
    CompareArguments,
    ConvertArguments,
    DataArguments,
    EvaluateArguments,
    ListArguments,
    SampleArguments,
    SweepArguments,
    TrainArguments,
)
from ddpm_fast.cli.config_file import reading_file
from ddpm_fast.cli.parsing import BY_FLAGS, own_flags, parse, refuse_unknown, value_of, without
from ddpm_fast.cli.waiting import wait_politely
from ddpm_fast.config import Config, DataConfig
from ddpm_fast.errors import InputError, MathematicsError, nearest, printable
from ddpm_fast.options import StartOptions, Wanted
from ddpm_fast.presets import plans, preset
from ddpm_fast.runs.signals import InterruptedRunError, Signals

USAGE = """usage: ddpm-fast COMMAND [flags]

Train and sample denoising diffusion models (DDPM, Ho et al. 2020).

commands:
  data      look at images before training: sizes, classes, copies, how they would be trained on
  train     train a U-Net; with no flags: on built-in handwritten digits, in minutes on a CPU
  sample    make images from a run or a checkpoint
  evaluate  how good its samples are, beside the real images
  check     is the mathematics right, here, now
  compare   what differs between two runs, and what the difference did
  sweep     try flags' values one after the other, judged against one run
  ls        which runs there are, how far each is, and which are running
  convert   a run for diffusers, as ONNX or by torch.export; or a diffusers model for us

`ddpm-fast COMMAND --help` explains every flag with its unit and default.
`ddpm-fast --version` says which version this is; `ddpm-fast --completion SHELL` prints what completes commands and
flags on the Tab key in bash, zsh or fish (README)."""
SHELLS = ("bash", "zsh", "fish")
BASH_PATHS = """
# Where no flag fits, complete paths.
_ddpm_fast() {
  _tyro_ddpm_fast
  [[ -n "${COMPREPLY[*]}" ]] || COMPREPLY=()
}
complete -o default -F _ddpm_fast ddpm-fast
"""
FITTING = ("--batch-size", "auto")
"""What memory decides, once all other flags are known."""
BROKEN_PIPE = 141
"""The exit status of what is piped into `head` and has more to say: 128 + SIGPIPE, as of other programs."""


@reading_file(TrainArguments)
def parse_train(arguments: Sequence[str]) -> TrainArguments:
    """Parse train's flags over the preset's defaults, a plan's, or the run's that is continued or judged against."""
    refuse_unknown(TrainArguments, arguments, "train")
    flags = without(*FITTING, arguments)
    parsed = parse(TrainArguments, flags, TrainArguments(config=_defaults(flags, "train")), "train")
    return parsed if flags == arguments else replace(parsed, config=_with_fitting_batch(parsed.config, parsed.start))


@reading_file(CheckArguments)
def parse_check(arguments: Sequence[str]) -> CheckArguments:
    """Parse check's flags over the preset's defaults, or a plan's.

    Raises:
        InputError: a run is named, and a flag that its own configuration decides.
    """
    refuse_unknown(CheckArguments, arguments, "check")
    flags = without(*FITTING, arguments)
    default = CheckArguments(config=_defaults(flags, "check"))
    parsed = parse(CheckArguments, flags, default.for_help() if _asks(flags) else default, "check")
    parsed.require_own_flags(arguments)
    return parsed if flags == arguments else replace(parsed, config=_with_fitting_batch(parsed.config, StartOptions()))


def _with_fitting_batch(config: Config, start: StartOptions) -> Config:
    from ddpm_fast.planning.start import with_auto_batch

    return with_auto_batch(config, start)


def _asks(arguments: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def _defaults(arguments: Sequence[str], command: str) -> Config:
    """Return the configuration that flags change."""
    name = value_of("--preset", arguments)
    given = [] if _asks(arguments) else arguments
    start = StartOptions()
    if command == "train":
        start = parse(StartOptions, own_flags(StartOptions, given)[0], command=command)
    data = value_of("--data", given) or ""
    init = value_of("--init", given) or ""
    another = start.resume or start.resume_or_start or start.against or init
    if not (another or plans(name, data, start.minutes)):
        return preset(name or "digits")
    from ddpm_fast.planning.start import starting_config

    data_flags = parse(DataConfig, own_flags(DataConfig, given)[0], command=command)
    wanted = parse(Wanted, own_flags(Wanted, given)[0], command=command)
    return starting_config(name, start, data_flags, wanted, init)


class Command(NamedTuple):
    """What a command understands, and what it does with it."""

    arguments: type
    """A dataclass of its flags."""
    run: Callable[[list[str]], int]
    """Parses and obeys; imports torch only then, so that errors and --help come first."""


def commands() -> dict[str, Command]:
    """Return all commands, by their names."""
    return {
        "data": Command(DataArguments, _data),
        "train": Command(TrainArguments, _train),
        "sample": Command(SampleArguments, _sample),
        "evaluate": Command(EvaluateArguments, _evaluate),
        "check": Command(CheckArguments, _check),
        "compare": Command(CompareArguments, _compare),
        "sweep": Command(SweepArguments, _sweep),
        "ls": Command(ListArguments, _ls),
        "convert": Command(ConvertArguments, _convert),
    }


def completion(shell: str) -> str:
    """Return the script that completes commands, flags and choices in a shell.

    Raises:
        InputError: there is none for that shell.
    """
    if shell not in SHELLS:
        raise InputError(f"--completion needs the name of a shell: {', '.join(SHELLS)}.{nearest(shell, SHELLS)}")
    arguments = {name: command.arguments for name, command in commands().items()}
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            arguments,
            prog="ddpm-fast",
            args=["--tyro-write-completion", shell, "-"],
            config=(tyro.conf.OmitArgPrefixes,),
            registry=BY_FLAGS,
        )
    return script.getvalue() + (BASH_PATHS if shell == "bash" else "")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log is to be read while it grows, and a file's name may hold bytes that are no text.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        try:
            status = run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # what cannot be written any more shows here, and not after main
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's own flush is silent
        status = BROKEN_PIPE
    if arguments is None:
        gc.freeze()  # nobody needs the cycles in what is left, and looking for them takes half a second
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run a command; return its exit status.

    Raises:
        SystemExit: a command's --help was asked for.
    """
    first, *rest = arguments or ["--help"]
    try:
        if first in ("-h", "--help", "help"):
            print(USAGE)
            return 0 if arguments else 2
        if first == "--version":
            print(f"ddpm-fast {__version__}")
            return 0
        if first == "--completion":
            print(completion(rest[0] if rest else ""))
            return 0
        known = commands()
        if first not in known:
            suggestion = nearest(first, known)
            raise InputError(f"unknown command {first!r}: the commands are {', '.join(known)}.{suggestion}")
        wait_politely()
        with Signals():
            if {"-h", "--help"}.isdisjoint(rest):
                import numpy  # noqa: F401  # else torch imports it, and swallows a signal that arrives meanwhile
            return known[first].run(rest)
    except InputError as error:
        return _say(error, 2)
    except OSError as error:  # of a name that was given: wherever it is looked for, this is what comes of it
        if error.errno not in (errno.ENAMETOOLONG, errno.EACCES):
            raise
        return _say(f"{error.filename} cannot be read: {error.strerror}", 2)
    except MathematicsError as error:
        return _say(error, 3)
    except InterruptedRunError as interrupted:
        return _say(interrupted, interrupted.exit_status)


def _say(message: object, status: int) -> int:
    """Say it in one line, though a name in it may hold line breaks, a terminal's commands or bytes that are no text."""
    print(f"ddpm-fast: {printable(str(message))}", file=sys.stderr)
    return status


def _train(arguments: list[str]) -> int:
    parsed = parse_train(arguments)
    from ddpm_fast.cli.commands import train

    return train(parsed.config, parsed.start)


def _data(arguments: list[str]) -> int:
    parsed = parse(DataArguments, arguments, command="data")
    from ddpm_fast.cli.looking import look

    return look(parsed)


def _sample(arguments: list[str]) -> int:
    parsed = parse(SampleArguments, arguments, command="sample")
    from ddpm_fast.cli.sampling import sample

    return sample(parsed)


def _evaluate(arguments: list[str]) -> int:
    parsed = parse(EvaluateArguments, arguments, command="evaluate")
    from ddpm_fast.cli.evaluating import evaluate

    return evaluate(parsed)


def _check(arguments: list[str]) -> int:
    parsed = parse_check(arguments)
    from ddpm_fast.cli.commands import check

    return check(parsed.config, parsed.run)


def _compare(arguments: list[str]) -> int:
    parsed = parse(CompareArguments, arguments, command="compare")
    from ddpm_fast.cli.comparing import compare

    return compare(parsed)


def _sweep(arguments: list[str]) -> int:
    own, grid = own_flags(SweepArguments, arguments)
    parsed = parse(SweepArguments, own, command="sweep")
    from ddpm_fast.cli.sweeping import prepare, sweep

    parsed, plan, base = prepare(parsed, grid)
    tried = {
        name: parse(TrainArguments, flags, TrainArguments(config=base), "sweep").config
        for name, flags in plan.combinations().items()
    }
    return sweep(parsed, plan, tried)


def _ls(arguments: list[str]) -> int:
    parsed = parse(ListArguments, arguments, command="ls")
    from ddpm_fast.cli.listing import list_runs

    return list_runs(parsed)


def _convert(arguments: list[str]) -> int:
    parsed = parse(ConvertArguments, arguments, command="convert")
    from ddpm_fast.cli.converting import convert

    return convert(parsed)
