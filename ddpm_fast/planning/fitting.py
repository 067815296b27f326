"""--batch-size auto: how many images a step takes, where the device's memory decides.

It is settled before anything else of a run, which from then on has a number like any other.
"""

from collections.abc import Sequence

from ddpm_fast.config import Config, TrainingConfig, with_training
from ddpm_fast.engine.speed import free_bytes
from ddpm_fast.planning.cost import memory
from ddpm_fast.planning.plan import MEMORY_SHARE, MOST_BATCH
from ddpm_fast.runs.device import prepare_device


def with_fitting_batch(config: Config) -> Config:
    """Return a preset's configuration with the largest batch that should fit the device's memory, and say which.

    On a GPU that is a power of two, for each part of --accumulate, up to 256 images in all; on a CPU the preset's own
    batch, halved until it fits. The learning rate stays what it is.

    Raises:
        InputError: the device is not there.
    """
    training = config.training
    device = prepare_device(training.device, training.precision)
    kind, free = device.type, free_bytes(device)
    taken = {size: memory(config.unet, size // training.accumulate, kind) for size in _sizes(training, kind)}
    size = next((size for size, needed in taken.items() if needed <= MEMORY_SHARE * free), min(taken))
    fits = f"of {free / 1e9:.1f} GB that are free"
    if taken[size] > MEMORY_SHARE * free:
        fits += ": memory may not suffice"
    print(f"--batch-size auto: {size}, for about {taken[size] / 1e9:.1f} {fits}", flush=True)
    return with_training(config, batch_size=size)


def _sizes(training: TrainingConfig, kind: str) -> Sequence[int]:
    """Return the sizes that come into question, the largest first."""
    parts, size = training.accumulate, training.batch_size
    if kind == "cuda":
        size = parts
        while 2 * size <= MOST_BATCH:
            size *= 2
    sizes = [size]
    while sizes[-1] % (2 * parts) == 0:
        sizes.append(sizes[-1] // 2)
    return sizes
