"""Where files are kept."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return where decoded images and compiled code live: $XDG_CACHE_HOME/ddpm-fast, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-fast"
