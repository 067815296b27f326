"""Which machine a figure belongs to.

    python -m bench.timing.machine [DEVICE]

prints the folder that its report lies in.
"""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.engine.execution import choose_device

PACKAGES = ("torch", "triton", "diffusers", "denoising-diffusion-pytorch", "numpy")
"""Packages whose versions move the figures."""


def cpu_name() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or a CPU's with the number of its threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def folder_name(facts: dict[str, Any]) -> str:
    """Return a machine's folder in `profiles/`: its device in lower case with dashes, a CPU's marked as such."""
    name = facts["device"] if facts["type"] == "cuda" else f"cpu {facts['device']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    # The metadata of a source build may lack what torch itself says of its build (+cpu, +cu130).
    found["torch"] = str(torch.__version__)
    return found


def commit() -> str:
    """Return the commit that is measured, marked where the tree differs from it; "unknown" outside a repository."""
    root = Path(__file__).parents[2]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device) -> dict[str, Any]:
    """Return what has to be known of a machine to read its figures."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "type": device.type,
        "host": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "versions": versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["memory_gb"] = round(properties.total_memory / 1e9, 1)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["cuda"] = torch.version.cuda
    return facts


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) > 1 else "auto"
    if asked == "cuda" and not torch.cuda.is_available():
        sys.exit("cuda: there is no NVIDIA GPU that this PyTorch can use; leave it out for what is here")
    print(Path("profiles") / folder_name(machine(choose_device(asked))))
