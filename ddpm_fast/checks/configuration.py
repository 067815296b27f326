"""Values far from the preset's: no fault of the code, but often of a keyboard."""

from collections.abc import Callable, Iterator

from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.config import Config
from ddpm_fast.errors import flag
from ddpm_fast.presets import PRESETS

FAR = 10.0
"""How many times larger or smaller a value is said."""
MEASURES: dict[str, Callable[[Config], float]] = {
    "timesteps": lambda config: config.diffusion.timesteps,
    "beta_start": lambda config: config.diffusion.beta_start,
    "beta_end": lambda config: config.diffusion.beta_end,
    "channels": lambda config: config.unet.channels,
    "dropout": lambda config: 1 - config.unet.dropout,
    "batch_size": lambda config: config.training.batch_size,
    "learning_rate": lambda config: config.training.learning_rate,
    "warmup_steps": lambda config: max(config.training.warmup_steps, 1),
    "cooldown": lambda config: config.training.cooldown,
    "adam_beta2": lambda config: 1 - config.training.adam_beta2,
    "clip_norm": lambda config: config.training.clip_norm,
    "ema_decay": lambda config: 1 - config.training.ema_decay,
    "min_snr_gamma": lambda config: config.training.min_snr_gamma,
}
"""What is compared, by field: a decay by the share that is new, dropout by the share that is kept.

Not what is another run's own business: steps, image size, and how often it logs, saves and draws."""
PARTS = ("unet", "diffusion", "training")


def _value(config: Config, name: str) -> float:
    return next(getattr(part, name) for part in (getattr(config, p) for p in PARTS) if hasattr(part, name))


def check_configuration(config: Config) -> Iterator[CheckResult]:
    """Name each value that is more than ten times its preset's, or less than a tenth; switching off is not far."""
    if config.preset not in PRESETS:
        return
    usual, far = PRESETS[config.preset], 0
    for name, measure in MEASURES.items():
        ours, theirs = measure(config), measure(usual)
        if ours > 0 and theirs > 0 and not 1 / FAR <= ours / theirs * (1 + 1e-9) <= FAR * (1 + 2e-9):
            far += 1
            expected, found = f"about {_value(usual, name):g}, as in {config.preset}", f"{_value(config, name):g}"
            text = f"{flag(name)} is near its preset's"
            yield CheckResult("configuration", text, Verdict.CHANGED, expected, found, "the flags of this run")
    if not far:
        name, expected = "values are near their preset's", f"within {FAR:.0f} times those of {config.preset}"
        yield CheckResult("configuration", name, Verdict.RIGHT, expected, "all of them", "ddpm_fast/presets.py")
