"""What a check found, and how that is told: right, another thing than the paper's, or wrong."""

import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from ddpm_fast.config import Stage
from ddpm_fast.engine.memory import is_out_of_memory
from ddpm_fast.errors import InputError

PACKAGE = Path(__file__).parents[1]


class Verdict(Enum):
    """What follows from a check."""

    RIGHT = "ok"
    CHANGED = "CHANGED"
    """Consistent, but another thing than the paper's: said, and training goes on."""
    WRONG = "FAIL"
    """What was asked for is not what is computed: nothing is trained."""


@dataclass(frozen=True)
class CheckResult:
    """One thing that was checked."""

    stage: Stage
    name: str
    verdict: Verdict
    expected: str
    found: str
    file: str
    """To look at, if it is not right."""

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.RIGHT


def judged(right: bool, otherwise: Verdict = Verdict.WRONG) -> Verdict:
    """Return RIGHT, or what it is otherwise."""
    return Verdict.RIGHT if right else otherwise


def accepting(results: Iterable[CheckResult], accepted: Iterable[str]) -> Iterator[CheckResult]:
    """Turn what is wrong in an accepted stage into CHANGED."""
    accepted = set(accepted)
    for result in results:
        wrong = result.verdict is Verdict.WRONG and result.stage in accepted
        yield replace(result, verdict=Verdict.CHANGED) if wrong else result


def naming_errors(stage: Stage, name: str, results: Iterable[CheckResult]) -> Iterator[CheckResult]:
    """Yield a stage's results; an error in the engine under it ends them in a line that says where it was raised.

    Raises:
        InputError: nothing is wrong but what was asked for.
        Exception: memory did not suffice.
    """
    try:
        yield from results
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)[::-1]]
        inside = [(file, line) for file, line in frames if PACKAGE in file.parents]
        places = [(file, line) for file, line in inside if file.parent.name != "checks"] or inside
        first = {str(Path(PACKAGE.name, file.relative_to(PACKAGE))): line for file, line in reversed(places)}
        file = ", ".join(f"{name}:{line}" for name, line in reversed(first.items()))
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield CheckResult(stage, name, Verdict.WRONG, "no error", words, file)


def _shown(result: CheckResult) -> str:
    tail = "" if result.passed else f"; look at {result.file}"
    return f"  {result.verdict.value:<7} {result.name}: expected {result.expected}, found {result.found}{tail}"


def report(results: Iterable[CheckResult], full: bool = False, strict: bool = False) -> int:
    """Print one line when all is well, else the lines that are not, the first to look at first; in full every line.

    Args:
        results: as they are found.
        full: print every line as it comes.
        strict: count what is CHANGED as wrong.

    Returns:
        The exit status: 0, or 3 if anything is wrong.
    """
    started, done = time.perf_counter(), list[CheckResult]()
    print("checking the mathematics" + (" in full" if full else ": "), end="\n" if full else "", flush=True)
    try:
        for result in results:
            done.append(result)
            if full:
                print(_shown(result), flush=True)
    except Exception:  # what was wrong before may say why
        print("".join(f"\n{_shown(result)}" for result in done if not result.passed and not full), flush=True)
        raise
    counts = {verdict: sum(result.verdict is verdict for result in done) for verdict in Verdict}
    unusual = [result for result in done if not result.passed]
    wrong = counts[Verdict.WRONG] + strict * counts[Verdict.CHANGED]
    if unusual and not full:
        first = sorted(unusual, key=lambda result: result.verdict is not Verdict.WRONG)  # stable: in the stages' order
        print("\n" + "\n".join(map(_shown, first)))
    if not wrong:
        changed = f", {len(unusual)} CHANGED" if unusual else ""
        print(f"{counts[Verdict.RIGHT]} checks passed{changed} in {time.perf_counter() - started:.1f} s")
        return 0
    stages = dict.fromkeys(result.stage for result in unusual if result.verdict is Verdict.WRONG)
    meant = f"--accept {' '.join(stages)}" if stages else "leave out --strict"
    print(f"{wrong} of {len(done)} checks failed: the mathematics is wrong (if this is meant: {meant})")
    return 3
