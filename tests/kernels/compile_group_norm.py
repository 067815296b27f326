"""Compile group_norm_silu's kernels ahead of time and print a line of JSON for each: registers, spills, load widths.

Run in a process without TRITON_INTERPRET:  python tests/kernels/compile_group_norm.py quick|all [90 ...]
`quick` is a shape for each path and hazard, `all` is every shape of the presets cifar10 and church256.
Shapes: C channels, H x W pixels, G groups (32).
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ddpm_fast.kernels import group_norm_silu as forward
from ddpm_fast.kernels import group_norm_silu_backward as backward
from ddpm_fast.kernels import group_norm_tiles as tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LIKE_X = ("x", "y", "dx", "dy", "shift", "dshift", "scale_shift", "dscale_shift")
WORDS = ("key", "sample_index")
INTEGERS = ("shift_stride", "HW", "slice_pixels", "layer", "N")
REGISTERS_PER_MULTIPROCESSOR = 65536


class Shape(NamedTuple):
    """One call in a preset's U-Net."""

    pixels: int
    channels: int
    dtype: str
    shift: bool = False
    dropout: bool = False


def presets() -> list[Shape]:
    """List the GroupNorms of cifar10 (norm2 with dropout) and church256: norm1 plain, norm2 with the shift."""
    cifar = {1024: (128, 256, 384), 256: (256, 384, 512), 64: (256, 512), 16: (256, 512)}
    church = {
        65536: (128, 256),
        16384: (128, 256, 384),
        4096: (128, 256, 384, 512),
        1024: (256, 512, 768),
        256: (512, 768, 1024),
        64: (512, 1024),
    }
    shapes = [
        shape
        for levels, dropout in ((cifar, True), (church, False))
        for pixels, widths in levels.items()
        for channels in widths
        for dtype in ("bf16", "fp32")
        for shape in (
            Shape(pixels, channels, dtype),
            *([Shape(pixels, channels, dtype, True, dropout)] if channels % 128 == 0 and channels != 384 else []),
        )
    ]
    return list(dict.fromkeys(shapes))


QUICK = [
    Shape(1024, 128, "bf16", shift=True, dropout=True),  # one tile, dropout
    Shape(1024, 384, "bf16"),  # loop, 24 of 32 lanes
    Shape(256, 256, "bf16"),  # one tile both ways
    Shape(16, 512, "bf16", shift=True, dropout=True),
    Shape(1024, 128, "fp32", shift=True, dropout=True),
    Shape(65536, 128, "bf16", shift=True),  # split
]


def launches(shape: Shape) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """Yield each kernel of a call with its compile-time arguments, slice_pixels and warps, as the launchers choose."""
    for inputs in (1, 2):
        itemsize = 4 if shape.dtype == "fp32" else 2
        chosen = tiles.plan(shape.pixels, shape.channels, 32, itemsize, inputs, shape.dropout)
        constants: dict[str, Any] = dict(tiles.sizes(chosen, shape.channels, 32))
        constants |= {"BLOCK_S": triton.next_power_of_2(chosen.slices), "ONE": chosen.one_tile, "SILU": True}
        constants |= {"THRESHOLD": 429496729 if shape.dropout else 0, "KEEP_SCALE": 1 / 0.9 if shape.dropout else 1.0}
        absent = ["scale_shift", "dscale_shift"]
        absent += [] if shape.shift else ["shift", "dshift"]
        absent += [] if shape.dropout else list(WORDS)
        absent += ["partials"] if chosen.slices == 1 else []
        constants |= dict.fromkeys(absent)
        first, second = (
            (forward.statistics_kernel, forward.normalize_kernel)
            if inputs == 1
            else (backward.sums_kernel, backward.input_gradient_kernel)
        )
        for kernel in (first, second) if chosen.slices > 1 else (second,):
            yield kernel, constants, chosen.slice_pixels, chosen.num_warps


def compile_kernel(
    kernel: Any, constants: dict[str, Any], integers: dict[str, int], dtype: str, capability: int, num_warps: int
) -> dict[str, Any]:
    """Compile for sm_<capability>; return registers, spilled bytes, shared memory and widths of global accesses."""
    signature, given, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], given[name] = "constexpr", constants[name]
            continue
        if name in INTEGERS:
            signature[name] = "i32"
        elif name == "eps":
            signature[name] = "fp32"
        else:
            signature[name] = "*" + (dtype if name in LIKE_X else "i64" if name in WORDS else "fp32")
        if signature[name][0] == "*" or integers.get(name, 1) % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, given, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"]
    report = assemble(ptx, capability)
    registers = int(re.findall(r"Used (\d+) registers", report)[0])
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)[0]
    return {
        "registers": registers,
        "spilled": sum(map(int, spills)),
        "shared": compiled.metadata.shared,
        "blocks": min(REGISTERS_PER_MULTIPROCESSOR // (-(-registers // 8) * 8 * 32 * num_warps), 64 // num_warps),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
    }


def assemble(ptx: str, capability: int) -> str:
    """Return what `ptxas -v` says of the PTX."""
    target = re.findall(r"\.target (sm_\w+)", ptx)[0]
    tool = TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [tool, "-v", "--gpu-name", target, path, "-o", path.with_suffix(".cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main() -> None:
    shapes = QUICK if sys.argv[1] == "quick" else presets()
    for capability in map(int, sys.argv[2:] or ("80", "90", "100")):
        for shape in shapes:
            for kernel, constants, slice_pixels, num_warps in launches(shape):
                integers = {"HW": shape.pixels, "slice_pixels": slice_pixels}
                result = compile_kernel(kernel, constants, integers, shape.dtype, capability, num_warps)
                tile = f"{constants['BLOCK_P']}x{constants['BLOCK_C']}"
                path = "one tile" if constants["ONE"] else "loop" if constants["SLICES"] == 1 else "split"
                row = {"sm": capability, "kernel": kernel.fn.__name__, **shape._asdict(), "path": path, "tile": tile}
                print(json.dumps({**row, "num_warps": num_warps, **result}), flush=True)


if __name__ == "__main__":
    main()
