"""Prints which build of PyTorch `make` installs here: "cpu", a fraction of the size, where there is no NVIDIA GPU."""

import platform
import sys
from pathlib import Path

KNOWN = (sys.version_info[:2], platform.system(), platform.machine()) == ((3, 11), "Linux", "x86_64")
"""The CPU build's wheel whose hash is in torch-cpu.txt."""
GPU = Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()  # the latter in the Windows Subsystem for Linux

print("cpu" if KNOWN and not GPU else "pypi")
