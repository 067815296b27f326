"""Compile every kernel ahead of time as the presets launch it, and read registers, spills and vector widths.

    python tests/kernels/compile_all.py                                    # the table
    python tests/kernels/compile_all.py --only q_sample --json
    python tests/kernels/compile_all.py --write profiles/kernels-compiled.md

No GPU is needed, but a process without TRITON_INTERPRET (there a jitted function is of another class). What to compile
lies in the files `specialise_*.py` beside this one: each has SPECIALISATIONS, a list of `Specialisation`.
"""

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have (CUDA programming guide, compute capabilities)."""


@dataclass(frozen=True)
class Specialisation:
    """One way in which a kernel is launched."""

    name: str
    """Kernel, then what is special, e.g. "q_sample C=3 bf16"; the first word is what --only selects."""
    kernel: Any
    """The jitted function."""
    signature: dict[str, str]
    """Types of the arguments that are no constants, e.g. {"x_ptr": "*bf16", "HW": "i32"}."""
    constants: dict[str, Any]
    """Constants; also None pointers, and integers that are 1, which a launch makes constants."""
    unaligned: tuple[str, ...] = ()
    """Integers that 16 does not divide; all the other arguments are divisible by 16, as pointers from torch are."""
    warps: int = 4
    load_bytes: int = 0
    """The widest load must have at least so many bytes a thread."""
    store_bytes: int = 0
    """Every store must have at least so many bytes a thread."""
    max_registers: int = 255
    """What the intended occupancy allows."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What came out, on one architecture."""

    name: str
    architecture: int
    warps: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    """How many load instructions of how many bytes a thread."""
    stores: dict[int, int]
    failures: list[str]


def widths(ptx: str, instruction: str) -> dict[int, int]:
    """Count a PTX's global loads ("ld") or stores ("st") by bytes a thread."""
    found: dict[int, int] = {}
    for vector, bits in re.findall(rf"\b{instruction}\.global(?:\.[\w:]*?)*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        size = int(vector or 1) * int(bits) // 8
        found[size] = found.get(size, 0) + 1
    return dict(sorted(found.items()))


def assemble(ptx: str) -> str:
    """Return what `ptxas -v` says of a PTX."""
    target = re.findall(r"^\.target (sm_\w+)", ptx, re.M)[0]
    assembler = "ptxas-blackwell" if target.startswith("sm_1") else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / assembler
        command = [program, "-v", f"--gpu-name={target}", source, "-o", Path(folder) / "kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def number(pattern: str, text: str) -> int:
    """Return the sum of all the numbers that a pattern finds."""
    return sum(map(int, re.findall(pattern, text)))


def compile_one(wanted: Specialisation, architecture: int) -> Compiled:
    """Compile a kernel for an architecture and judge it."""
    names = wanted.kernel.arg_names
    types = {name: "constexpr" if name in wanted.constants else wanted.signature[name] for name in names}
    divisible = [["tt.divisibility", 16]]
    aligned = {
        (place,): divisible
        for place, name in enumerate(names)
        if types[name].startswith(("*", "i")) and name not in wanted.unaligned
    }
    source = ASTSource(wanted.kernel, types, constexprs=wanted.constants, attrs=aligned)
    options = {"num_warps": wanted.warps, **wanted.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    said = assemble(ptx)
    spills, stack = number(r"(\d+) bytes spill", said), number(r"(\d+) bytes stack", said)
    registers, loads, stores = number(r"Used (\d+) registers", said), widths(ptx, "ld"), widths(ptx, "st")
    judged = {
        f"spills {spills} bytes": spills > 0,
        f"{registers} registers, over {wanted.max_registers}": not 0 < registers <= wanted.max_registers,
        f"{shared} bytes of shared memory": shared > SHARED_LIMIT[architecture],
        f"widest load under {wanted.load_bytes} bytes: {loads}": max(loads, default=0) < wanted.load_bytes,
        f"a store under {wanted.store_bytes} bytes: {stores}": min(stores, default=0) < wanted.store_bytes,
    }
    failures = [message for message, failed in judged.items() if failed]
    return Compiled(wanted.name, architecture, wanted.warps, registers, spills, stack, shared, loads, stores, failures)


def collect(only: str = "") -> list[Specialisation]:
    """Return the specialisations in the files beside this one, of one kernel or of all but the planted failures."""
    modules = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("specialise_*.py"))]
    found = [wanted for module in modules for wanted in module.SPECIALISATIONS]
    return [wanted for wanted in found if wanted.name.split()[0] == (only or wanted.name.split()[0])] + [
        wanted for module in modules for wanted in getattr(module, "PLANTED", []) if wanted.name.split()[0] == only
    ]


def _compile_named(job: tuple[int, int, str]) -> Compiled:
    place, architecture, only = job
    return compile_one(collect(only)[place], architecture)


def compile_all(only: str = "", processes: int = 2) -> list[Compiled]:
    """Compile everything for every architecture; jobs go by number, as jitted functions do not pickle."""
    jobs = [(place, architecture, only) for place, architecture in product(range(len(collect(only))), ARCHITECTURES)]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_compile_named, jobs))


def table(rows: list[Compiled]) -> str:
    """Return the results as a Markdown table."""
    head = "| kernel | sm | warps | registers | spilt bytes | shared bytes | loads (bytes: count) | stores |\n"
    lines = [head + "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        loads, stores = (", ".join(f"{b}: {n}" for b, n in found.items()) for found in (row.loads, row.stores))
        numbers = f"{row.architecture} | {row.warps} | {row.registers} | {row.spill_bytes} | {row.shared_bytes}"
        lines.append(f"| {row.name} | {numbers} | {loads} | {stores} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="one kernel, by name")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of the table")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    rows = compile_all(arguments.only, arguments.processes)
    print(json.dumps([dataclasses.asdict(row) for row in rows]) if arguments.json else table(rows))
    failures = [f"{row.name} sm_{row.architecture}: {failure}" for row in rows for failure in row.failures]
    if arguments.write:
        title = f"# The kernels as compiled\n\nTriton {triton.__version__}, ptxas of its wheel; no GPU was used. "
        how = "Made by `python tests/kernels/compile_all.py --write profiles/kernels-compiled.md`.\n\n"
        arguments.write.write_text(title + how + table(rows))
    print("\n".join(failures), file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    import compile_all as module  # so that Specialisation is one class, here and in the files that fill the list

    sys.exit(module.main())
