"""What a launch is for, told by the names of kernels and calls."""

import re
from collections.abc import Iterable
from typing import Any

from bench.launches.record import Entry

SMALL = 16_384
"""Bytes below which a compiled kernel handles a parameter of one dimension and no feature map."""

# Inductor names a kernel after the operators that it fused; the first pattern that a name matches decides.
FORWARD: tuple[tuple[str, str], ...] = (
    ("parameters side by side", r"^triton_for|fused__to_copy_cat_"),
    ("nearest upsampling, with what it joins", r"stack|unsafe_index|expand"),
    ("concatenation", r"cat"),
    ("padding", r"pad"),
    ("time embedding", r"fused_silu"),
    ("residual or shortcut added", r"add(?!mm)"),
    ("parameters cast to bfloat16", r"^triton_\w+_fused__to_copy_\d+$"),
    ("a convolution's bias alone", r"convolution"),
)
BACKWARD: tuple[tuple[str, str], ...] = (
    ("gradients cast to float32", r"^triton_\w+_fused__to_copy_\d+$"),
    ("gradient summed over pixels or images", r"^triton_(red|per)_"),
    ("nearest upsampling's gradient", r"new_zeros|index_put|unsafe_view_clone_transpose|select|stack"),
    ("attention's gradient laid out", r"attention_backward"),
    ("gradients of q, k and v, or of shifts, side by side", r"cat"),
    ("gradients added", r"add|slice"),
)
UPDATE = "update of the weights"
GRADIENTS = "gradients side by side in float32"
ELEMENTS = "PyTorch: single elements and copies"
PYTORCH: tuple[tuple[str, str], ...] = (
    (UPDATE, r"FusedAdam|NormTwo|lerp"),
    (GRADIENTS, r"multi_tensor_apply"),
    (ELEMENTS, r""),
)
PASSES = {
    "_foreach_copy_": GRADIENTS,
    "_foreach_add_": GRADIENTS,
    "_fused_adam_": UPDATE,
    "vector_norm": UPDATE,
    "lerp_": UPDATE,
    "adam_ema": UPDATE,
    "copy_": ELEMENTS,
}
"""What calls that note their bytes are for; those of other launchers are the engine's kernels."""


def _first(table: tuple[tuple[str, str], ...], name: str) -> str | None:
    return next((kind for kind, pattern in table if re.search(pattern, name)), None)


def kind_of(name: str, moved: int, backward: bool) -> str:
    """Return what a Triton kernel of this name is for; `moved` bytes."""
    if not name.startswith("triton_"):
        return UPDATE if name.startswith("adam_") else "the engine's kernels"
    if not backward and "convolution" in name and "to_copy" in name and moved < SMALL:
        return "forward: parameters cast to bfloat16"
    side = "backward" if backward else "forward"
    return f"{side}: {_first(BACKWARD if backward else FORWARD, name) or 'other'}"


def count(step: Iterable[Entry]) -> dict[str, dict[str, int]]:
    """Count a captured step's launches and bytes by kind.

    A call of cuDNN or cuBLAS counts as one launch, and is not seen to launch more. Bytes are each input and each output
    once, as the caller or Inductor counts them; PyTorch's kernels on single elements count none.
    """
    found: dict[str, dict[str, int]] = {}
    backward, moved = False, 0

    def add(kind: str, launches: int, size: int) -> None:
        row = found.setdefault(kind, {"launches": 0, "bytes": 0})
        row["launches"] += launches
        row["bytes"] += size

    for event, values in step:
        if event == "phase":
            backward = values[0] == "backward"
        elif event == "call":
            add(f"{values[0]} (calls)", 1, int(values[1]))
        elif event == "moved":
            name, moved = values[0], int(values[1])
            if not name.startswith("triton_"):
                add(PASSES.get(name, "the engine's kernels"), 0, moved)
        elif event == "launch" and values[0] == "triton":
            fused = values[1].startswith("triton_")
            add(kind_of(values[1], moved, backward), 1, moved if fused else 0)
        elif event == "launch":
            add(_first(PYTORCH, values[1]) or "", 1, 0)
        elif event in ("copy", "fill"):
            add("copies and fills", 1, int(values[0]))
    return found


def total(kinds: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Return launches and bytes of all kinds together."""
    return {key: sum(row[key] for row in kinds.values()) for key in ("launches", "bytes")}
