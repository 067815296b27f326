"""Build the stand-in for CUDA, and start Python with it."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import triton

HERE = Path(__file__).parent
SOURCES = ("runtime.c", "device.c", "standin.h")


def reason_it_cannot_run() -> str | None:
    """Return why the stand-in cannot take CUDA's place in this environment; None if it can."""
    if not torch.__version__.startswith("2.11.") or torch.version.cuda is None:
        return f"the stand-in needs PyTorch's CUDA build in version 2.11, and this is {torch.__version__}"
    return None


def build(folder: Path) -> None:
    """Compile the stand-in into a folder, as the driver's library, by which name PyTorch and Triton look for it."""
    includes = [
        Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include",
        Path(triton.__file__).parent / "backends" / "nvidia" / "include",
    ]
    options = ["-shared", "-fPIC", "-O1", *(f"-I{path}" for path in includes)]
    sources = [str(HERE / name) for name in SOURCES if name.endswith(".c")]
    subprocess.run(["gcc", *options, *sources, "-o", str(folder / "libcuda.so.1"), "-lpthread"], check=True)


def run(folder: Path, module: str, *arguments: str) -> str:
    """Run a module of this tree with the stand-in in CUDA's place, and return what it prints.

    Args:
        folder: what `build` compiled into; compiled kernels are kept there too.
        module: by its dotted name.
        arguments: of the module.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    root = HERE.parents[1]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "STANDIN_FOLDER": str(folder),
        "PYTHONPATH": str(root),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TRITON_CACHE_DIR": str(folder / "cache" / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout
