"""How to run: device, precision, compiling, capturing; and where compiled code is kept.

Flags say what is allowed; the device limits it to what it supports.
"""

import ctypes
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from ddpm_fast.files import cache_directory

F = TypeVar("F", bound=Callable[..., Any])

RECOMPILE_LIMIT = 64
"""Shapes that one function may be compiled for in a process: a batch size each, and as many image sizes."""
CPU_FLOP_RATE = 4e10
"""FLOP/s that one CPU core reaches in a small U-Net's forward pass on 64 images (measured: AVX2, float32)."""
MOST_JOINED = 64
"""Tensors that compiled code joins by one launch, instead of one each: the gradients of all blocks' shifts."""
COMPILING_PAYS_FROM = 1800.0
"""Estimated seconds of eager sampling on a CPU: compiling takes a minute and saves 1% (cifar10) to 23% (digits)."""


@dataclass(frozen=True)
class Execution:
    """How steps are run."""

    compiled: bool = False
    """Compile with torch.compile, in static shapes."""
    captured: bool = False
    """Capture the step as a CUDA graph."""

    def __str__(self) -> str:
        """Say it in words."""
        layers = [name for name, there in (("compiled", self.compiled), ("captured", self.captured)) if there]
        return " and ".join(layers) or "eager"

    def compile(self, function: F) -> F:
        """Return the function compiled, if that is asked for."""
        if not self.compiled:
            return function
        set_compile_cache()
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # --precision decides that
        options: dict[str, Any] = {"max_pointwise_cat_inputs": MOST_JOINED}
        return cast(F, torch.compile(function, dynamic=False, fullgraph=True, options=options))


EAGER = Execution()


def choose_device(name: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" means here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the U-Net's arithmetic; auto is bfloat16 on GPUs with tensor cores for it (Ampere and later).

    On a CPU without such units bfloat16 convolutions are about 56 times slower than float32: never auto there.
    """
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def set_tf32(precision: str) -> None:
    """Allow or forbid TF32 for float32 products and convolutions; PyTorch's default allows it for the latter only."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def set_deterministic(on: bool) -> None:
    """Have PyTorch take only algorithms on a GPU that give the same bits each time, or the fastest, as by itself."""
    torch.backends.cudnn.deterministic = on
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used


def choose_execution(compile: bool, capture: bool, device: torch.device, sampling_flop: float = 0) -> Execution:
    """Return what --no-compile and --no-capture leave on this device.

    On a CPU there are no graphs, and compiling must pay for its minute: only a long sampling is compiled. Training
    is not: a step took 0.92 (digits) to 0.99 (cifar10) of its time so.

    Args:
        compile, capture: what the flags allow.
        device: to run on.
        sampling_flop: FLOPs of all that will be sampled; 0 for training.
    """
    if device.type == "cuda":
        return Execution(compile, capture)
    seconds = sampling_flop / (CPU_FLOP_RATE * torch.get_num_threads())
    return Execution(compiled=compile and seconds >= COMPILING_PAYS_FROM and can_compile_for_cpu())


def can_compile_for_cpu() -> bool:
    """Return whether PyTorch finds what it compiles for a CPU with: a C++ compiler, and Python's headers."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return sys.platform == "linux" and headers.exists() and shutil.which(os.environ.get("CXX", "g++")) is not None


def disable_malloc_trim() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, instead of handing it back each time.

    This makes training on a CPU 6 to 10% faster: page faults per step fall from 18,000 to 650 (64 digits of 16x16).
    Only glibc has these two settings; if the user set one by an environment variable, both are left alone. Peak memory
    was the same in training digits, mnist and cifar10.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    users = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if mallopt is None or users or "_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    mallopt(m_mmap_threshold, 32 << 20)  # the most that glibc takes
    mallopt(m_trim_threshold, 2**31 - 1)


def set_compile_cache() -> None:
    """Keep what compilers make in the cache directory, so that a second run starts within seconds.

    PyTorch's own place is below /tmp and does not survive a restart. Places that the user has set stay. A graph with an
    autograd function of our own is kept only if allowed: its code is then part of what the graph is found by.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_directory() / "triton"))
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True  # pyright: ignore[reportAttributeAccessIssue]
