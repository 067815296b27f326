"""Train and sample denoising diffusion models (DDPM)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_fast.api import TrainedRun, accelerate, load, train
    from ddpm_fast.errors import InputError, MathematicsError
    from ddpm_fast.presets import PRESETS
    from ddpm_fast.runs.grids import Images
    from ddpm_fast.runs.signals import InterruptedRunError
    from ddpm_fast.runs.trained_model import Model

__version__ = "0.1.0"

_HOMES = {
    "PRESETS": "presets",
    "Images": "runs.grids",
    "InputError": "errors",
    "InterruptedRunError": "runs.signals",
    "MathematicsError": "errors",
    "Model": "runs.trained_model",
    "TrainedRun": "api",
    "accelerate": "api",
    "load": "api",
    "train": "api",
}
__all__ = [
    "PRESETS",
    "Images",
    "InputError",
    "InterruptedRunError",
    "MathematicsError",
    "Model",
    "TrainedRun",
    "__version__",
    "accelerate",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch takes seconds, and --help needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
