"""What `ddpm-fast sweep` does: one run after the other, each judged against the base, and a table at the end."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ddpm_fast.cli.arguments import SweepArguments
from ddpm_fast.cli.comparing import write_page
from ddpm_fast.config import Config
from ddpm_fast.engine.memory import free_memory
from ddpm_fast.errors import MathematicsError, NotEnoughMemoryError, require
from ddpm_fast.files import require_writable
from ddpm_fast.flags import changed_flags
from ddpm_fast.launch import next_free, train_config
from ddpm_fast.options import StartOptions
from ddpm_fast.runs.against import LOST
from ddpm_fast.runs.compare import LOSS_IS_NOT_QUALITY, open_run
from ddpm_fast.runs.signals import InterruptedRunError
from ddpm_fast.runs.sweep import FAILED, Plan, failed, ranking, read_grid, read_plan, verdict_of


def prepare(arguments: SweepArguments, flags: Sequence[str]) -> tuple[SweepArguments, Plan, Config]:
    """Return the arguments with --out decided, what the sweep consists of, and the base's configuration.

    Raises:
        InputError: a flag cannot be tried, nothing is to be tried, or --out holds anything and is not continued.
    """
    if arguments.resume:
        plan = read_plan(Path(arguments.out))
        require(
            not flags, f"--resume takes the flags that {arguments.out} was started with: leave {' '.join(flags)} out"
        )
    else:
        directory = Path(arguments.out) if arguments.out else next_free(Path("runs"), "sweep")
        taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
        require(not taken, f"--out {directory} exists and is not empty: add --resume to continue it, or name another")
        arguments = replace(arguments, out=str(directory))
        plan = Plan(str(Path(arguments.against).resolve()), read_grid(flags))
        require(
            bool(plan.grid), "nothing to try: name one or more of train's flags with values, --learning-rate 1e-3 2e-3"
        )
    return arguments, plan, open_run(Path(plan.against)).config


def sweep(arguments: SweepArguments, plan: Plan, configs: Mapping[str, Config]) -> int:
    """Train each configuration that has not come to its end yet, and rank them; returns the exit status.

    Args:
        arguments: where to write.
        plan: what the sweep consists of.
        configs: of each run, by the name of its directory.
    """
    directory, base = Path(arguments.out), open_run(Path(plan.against))
    require_writable(directory)
    plan.write(directory)
    tried = {name: config for name, config in configs.items() if changed_flags(base.config, config)}
    for name in configs.keys() - tried.keys():
        print(f"{name} is the base, {plan.against}")
    require(len(set(tried.values())) == len(tried), "two of the values to try mean the same: leave one out")
    for number, (name, config) in enumerate(tried.items(), start=1):
        run = directory / name
        verdict = verdict_of(run)
        print(f"\nrun {number} of {len(tried)}: {name}" + (f" has ended: {verdict}" if verdict else ""), flush=True)
        if verdict is None:
            start = StartOptions(str(run), resume_or_start=True, against=plan.against)
            try:
                train_config(config, start, sys.stderr.isatty(), LOST)
            except (MathematicsError, NotEnoughMemoryError) as error:
                print(f"{name} failed: {error}")
                failed(run)
            except InterruptedRunError as interrupted:
                how = f"continue by ddpm-fast sweep --out {shlex.quote(str(directory))} --resume"
                raise InterruptedRunError(interrupted.number, f"stopped in {run}; {how}") from None
            free_memory()
    runs = [open_run(directory / name) for name in tried if verdict_of(directory / name) != FAILED]
    require(bool(runs), f"no run of {directory} could be trained to its end")
    print(f"\nevaluation loss against {plan.against}, the best difference first")
    print("\n".join(ranking(base, runs)))
    print(f"{LOSS_IS_NOT_QUALITY}.")
    write_page(directory / "page.html", base, runs, arguments.images)
    return 0
