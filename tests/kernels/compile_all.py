"""Compile every kernel ahead of time as the presets launch it, and read registers, spills and vector widths.

    python tests/kernels/compile_all.py                                    # the tables
    python tests/kernels/compile_all.py --only q_sample noise_mse --sm 90 --json
    python tests/kernels/compile_all.py --write profiles/kernels-compiled.md

It takes some three minutes on two cores, and no GPU; but a process without TRITON_INTERPRET, where a jitted function is
of another class. What to compile is what the launchers launch when they are given tensors without memory; the files
`specialise_*.py` beside this one call them with the presets' shapes: each has `specialisations`, which yields them.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ddpm_fast.config import DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.kernels import checks
from ddpm_fast.presets import PRESETS

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have (CUDA programming guide, compute capabilities)."""
CONFIGS = [
    *PRESETS.values(),
    # Sizes of 1 are constants to Triton, on which code may fail that is right for others.
    replace(
        PRESETS["digits"],
        unet=UNetConfig(1, 1, 1, 2, (1,), attention_resolutions=(), groups=1),
        diffusion=DiffusionConfig(timesteps=1),
        training=TrainingConfig(batch_size=1),
    ),
]
"""What is compiled for: the presets, and the least that there can be."""
MAX_REGISTERS = 128
"""16 warps a multiprocessor of 65,536 registers: enough loads in flight for its share of the memory bandwidth."""
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int64: "i64"}


class Launch(NamedTuple):
    """One launch, recorded instead of done."""

    kernel: Any  # the jitted function
    arguments: dict[str, Any]


class Specialisation(NamedTuple):
    """One way in which a kernel is launched; equal ones compile to the same code."""

    kernel: Any
    types: tuple[str, ...]  # of each argument, "constexpr" for constants
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # numbers of the arguments that 16 divides
    warps: int
    bulk_load_bytes: int = 0  # a thread must load and store at least so many bytes in pieces of 16
    bulk_store_bytes: int = 0
    name: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def op(self) -> str:
        """The kernel's file."""
        return self.kernel.fn.__module__.split(".")[-1]


@dataclass(frozen=True)
class Compiled:
    """What came out, on one architecture."""

    kernel: str
    name: str
    architecture: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    """How many load instructions of how many bytes a thread."""
    stores: dict[int, int]
    failures: list[str] = field(default_factory=list)


def record(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launch]:
    """Return what a launcher launches for tensors on the meta device, which it would refuse."""
    launches = []

    def run(kernel: Any, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        launches.append(Launch(kernel, arguments))

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(checks, "check_device"):
        call(*args, **kwargs)
    return launches


def specialise(launch: Launch, name: str, bulk_load_bytes: int = 0, bulk_store_bytes: int = 0) -> Specialisation:
    """Type a launch's arguments as Triton does: None and 1 become constants, tensors from torch are aligned."""
    types, constants, divisible = [], [], []
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            constants.append((parameter.name, value))
            types.append("constexpr")
        elif isinstance(value, float):
            types.append("fp32")
        else:
            types.append(f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32")
            if isinstance(value, Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
                divisible.append(place)
    warps = launch.arguments.get("num_warps", 4)
    bulk = bulk_load_bytes // 16 * 16, bulk_store_bytes // 16 * 16
    options = tuple((option, launch.arguments[option]) for option in ("maxnreg",) if option in launch.arguments)
    return Specialisation(launch.kernel, tuple(types), tuple(constants), tuple(divisible), warps, *bulk, name, options)


def widths(ptx: str, instruction: str) -> dict[int, int]:
    """Count a PTX's global loads ("ld") or stores ("st") by bytes per thread."""
    found: dict[int, int] = {}
    for vector, bits in re.findall(rf"\b{instruction}\.global(?:\.[\w:]*?)*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        size = int(vector or 1) * int(bits) // 8
        found[size] = found.get(size, 0) + 1
    return dict(sorted(found.items()))


def number(pattern: str, text: str) -> int:
    """Return the sum of all the numbers that a pattern finds."""
    return sum(map(int, re.findall(pattern, text)))


def compile_one(wanted: Specialisation, architecture: int) -> Compiled:
    """Compile a kernel for an architecture as a launch there would, and judge it."""
    types = dict(zip(wanted.kernel.arg_names, wanted.types, strict=True))
    aligned = {(place,): [["tt.divisibility", 16]] for place in wanted.divisible}
    source = ASTSource(wanted.kernel, types, constexprs=dict(wanted.constants), attrs=aligned)
    options = {"num_warps": wanted.warps, **dict(wanted.options)}
    with contextlib.redirect_stdout(io.StringIO()) as said:  # by ptxas -v, with Triton's own options
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    log, ptx, shared = said.getvalue(), compiled.asm["ptx"], compiled.metadata.shared
    spills, registers = number(r"(\d+) bytes spill", log), number(r"Used (\d+) registers", log)
    loads, stores = widths(ptx, "ld"), widths(ptx, "st")
    judged = {
        f"spills {spills} bytes": spills > 0,
        f"{registers} registers, over {MAX_REGISTERS}": not 0 < registers <= MAX_REGISTERS,
        f"{shared} bytes of shared memory": shared > SHARED_LIMIT[architecture],
        f"under {wanted.bulk_load_bytes} bytes in wide loads": 16 * loads.get(16, 0) < wanted.bulk_load_bytes,
        f"under {wanted.bulk_store_bytes} bytes in wide stores": 16 * stores.get(16, 0) < wanted.bulk_store_bytes,
    }
    failures = [message for message, failed in judged.items() if failed]
    numbers = wanted.warps, registers, spills, shared
    return Compiled(wanted.kernel.fn.__name__, wanted.name, architecture, *numbers, loads, stores, failures)


def distinct(found: Iterable[Specialisation]) -> list[Specialisation]:
    """Return each specialisation once, under its first name."""
    return list({wanted._replace(name=""): wanted for wanted in reversed(list(found))}.values())[::-1]


def collect(only: Collection[str] = ()) -> list[Specialisation]:
    """Return the specialisations in the files beside this one, of some ops or all, or the "planted" failures."""
    modules = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("specialise_*.py"))]
    if "planted" in only:
        return [wanted for module in modules for wanted in getattr(module, "planted", list)()]
    found = distinct(wanted for module in modules for wanted in module.specialisations())
    return [wanted for wanted in found if not only or wanted.op in only]


def one_per_architecture(found: list[Specialisation], architectures: Sequence[int]) -> list[tuple[Specialisation, int]]:
    """Choose one specialisation per kernel and architecture, evenly spread over the kernel's own."""
    chosen = []
    for kernel in dict.fromkeys(wanted.kernel for wanted in found):
        own = [wanted for wanted in found if wanted.kernel == kernel]
        for place, architecture in enumerate(architectures):
            chosen.append((own[(len(own) - 1) * place // max(1, len(architectures) - 1)], architecture))
    return chosen


_jobs: list[tuple[Specialisation, int]] = []


def _compile_job(place: int) -> Compiled:
    return compile_one(*_jobs[place])


def compile_all(only: Collection[str], architectures: Sequence[int], processes: int, few: bool) -> list[Compiled]:
    """Compile all, or a few; workers inherit the jobs and are sent numbers, as jitted functions do not pickle."""
    found = collect(only)
    _jobs[:] = one_per_architecture(found, architectures) if few else product(found, architectures)
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.disable_line_info = True  # it changes no instruction, and costs a sixth of the time
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        multiprocessing.get_context("fork").Pool(processes) as pool,
    ):
        return pool.map(_compile_job, range(len(_jobs)), chunksize=1)


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *(map(str, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def resident_warps(row: Compiled) -> int:
    """Return how many warps a multiprocessor's 65,536 registers hold, of 64 at most in 32 blocks at most."""
    registers = -(-row.registers // 8) * 8 * 32 * row.warps
    return min(65536 // registers, 64 // row.warps, 32) * row.warps


def summary(rows: list[Compiled]) -> str:
    """Return a table with a line a kernel: the worst of all its launches and architectures."""
    head = ("kernel", "launches", "registers", "warps resident", "spilt bytes", "shared bytes")
    lines = []
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == kernel]
        registers, warps = max(row.registers for row in own), min(map(resident_warps, own))
        spilt, shared = sum(row.spill_bytes for row in own), max(row.shared_bytes for row in own)
        lines.append((kernel, len({row.name for row in own}), registers, warps, spilt, shared))
    return markdown(head, lines)


def details(rows: list[Compiled]) -> str:
    """Return a table with a line a launch, the architectures' registers side by side; loads and stores are sm_90's."""
    by_launch: dict[tuple[str, str, int], dict[int, Compiled]] = {}
    for row in rows:
        by_launch.setdefault((row.kernel, row.name, row.warps), {})[row.architecture] = row
    columns = sorted({row.architecture for row in rows})
    lines = []
    for (kernel, name, warps), found in by_launch.items():
        shown = found.get(90) or next(iter(found.values()))
        vectors = (", ".join(f"{n} x {b}" for b, n in widths.items()) for widths in (shown.loads, shown.stores))
        lines.append((kernel, name, warps, *(found[sm].registers for sm in columns), shown.shared_bytes, *vectors))
    return markdown(("kernel", "launch", "warps", *(f"sm_{sm}" for sm in columns), "shared", "loads", "stores"), lines)


def report(rows: list[Compiled]) -> str:
    """Return the tables, and how they were made."""
    return f"""# The kernels as compiled

Made by `python tests/kernels/compile_all.py --write profiles/kernels-compiled.md` with Triton {triton.__version__} and
the ptxas of its wheel; no GPU was used. Every launch that the presets make, in float32 and bfloat16, each once.

{summary(rows)}
Registers per thread by architecture; loads and stores of global memory as count x bytes per thread.

{details(rows)}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="ops, by the names of their files")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--few", action="store_true", help="one launch per kernel and architecture")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of tables")
    parser.add_argument("--write", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    rows = compile_all(arguments.only, arguments.sm, arguments.processes, arguments.few)
    print(json.dumps([dataclasses.asdict(row) for row in rows]) if arguments.json else report(rows))
    if arguments.write:
        arguments.write.write_text(report(rows))
    failures = [f"{row.kernel} {row.name} sm_{row.architecture}: {failure}" for row in rows for failure in row.failures]
    print("\n".join(failures), file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    import compile_all as module  # so that Specialisation is one class, here and in the files that yield them

    sys.exit(module.main())
