"""How the presets launch adam_ema (see `compile_all`): with the parameters of their U-Nets side by side.

Shapes: P weights.
"""

from collections.abc import Iterator

import torch
from compile_all import CONFIGS, Launch, Specialisation, record, specialise
from torch import Tensor

from ddpm_fast.constants import STEP_FIGURE, STEP_NUMBER
from ddpm_fast.engine.flat_weights import places
from ddpm_fast.kernels.adam_ema import BLOCK, SQUARES, adam_ema
from ddpm_fast.model.unet import UNet


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def expected(launch: Launch) -> tuple[int, int]:
    """Return the bytes that a thread loads and stores of gradient, weights, moments, average and copy."""
    given, name = launch.arguments, launch.kernel.fn.__name__
    share = {"adam_norm_kernel": SQUARES.value, "adam_ema_kernel": BLOCK.value}.get(name, 0) // (32 * 4)
    if name != "adam_ema_kernel":
        return 4 * share, 0
    copied = given["low_precision_ptr"]
    return 5 * 4 * share, (4 * 4 + (0 if copied is None else copied.element_size())) * share


def specialisations() -> Iterator[Specialisation]:
    for config in {config.unet: config for config in CONFIGS}.values():
        with torch.device("meta"):
            P = places(dict(UNet(config.unet).named_parameters()))[1]
        state = [empty(P) for _ in range(4)]
        numbers, figures = empty(len(STEP_NUMBER), dtype=torch.int64), empty(len(STEP_FIGURE))
        for copied in (None, empty(P, dtype=torch.bfloat16)):
            given = (*state, empty(P), empty(), numbers, figures, copied)
            rates = {"learning_rate": 2e-4, "warmup_steps": 5000, "steps": 800_000, "cooldown_steps": 0}
            options = {**rates, "beta2": 0.999, "clip_norm": 1.0, "ema_decay": 0.9999}
            for launch in record(adam_ema, *given, **options):
                name = f"{'float32' if copied is None else 'bfloat16'} P={P}"
                yield specialise(launch, name, *expected(launch))
