"""Which checkpoints a run keeps, and whether there is room for those to come."""

import contextlib
import shutil
from pathlib import Path

import torch

from ddpm_fast.config import Config, TrainingConfig
from ddpm_fast.errors import InputError
from ddpm_fast.model.unet import UNet
from ddpm_fast.runs import checkpoint

BYTES_PER_PARAMETER = 4 * 4
"""The weight, its average and Adam's two moments, in float32."""


def superseded(run: Path, training: TrainingConfig, newest: int) -> list[int]:
    """Return the steps whose checkpoints --keep-last and --keep-every give up, after the newest was written.

    Kept are also those from before a cooldown, that of their own configuration or of this one, from which a run can be
    continued for more steps; and what is damaged, which is not counted, and somebody else's to look at.
    """
    if not training.keep_last:
        return []
    kept, given_up = 0, list[int]()
    for step in checkpoint.steps_saved(run):
        if step > newest:
            continue
        with contextlib.suppress(InputError):
            of_then = checkpoint.read(checkpoint.path_of(run, step)).config.training
            marked = step in (newest, training.cooldown_start, of_then.cooldown_start)
            marked |= training.keep_every > 0 and step % training.keep_every == 0
            if kept >= training.keep_last and not marked:
                given_up.append(step)
            kept += 1
    return given_up


def delete_superseded(run: Path, training: TrainingConfig, newest: int) -> None:
    """Delete what is `superseded`: each is renamed first, so that none is ever seen half deleted."""
    for step in superseded(run, training, newest):
        path = checkpoint.path_of(run, step)
        going = path.with_name(f".{path.name}.deleted")
        with contextlib.suppress(OSError):  # it is deleted after the next checkpoint, or lies there
            path.replace(going)
            shutil.rmtree(going)


def checkpoint_bytes(config: Config) -> int:
    """Return about how many bytes a checkpoint takes."""
    with torch.device("meta"):
        return BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in UNet(config.unet).parameters())


def checkpoints_to_come(training: TrainingConfig, step: int) -> int:
    """Return the most checkpoints that there will be beside today's, while a run goes on from a step."""
    every, last = training.save_every, training.steps
    saved = {*range((step // every + 1) * every, last, every), training.cooldown_start, last}
    saved = {each for each in saved if each > step}
    if not training.keep_last:
        return len(saved)
    marked = {each for each in saved if training.keep_every and each % training.keep_every == 0}
    return min(len(saved), training.keep_last + len(marked) + 2)  # one from before the cooldown, and one being written


def require_space(run: Path, config: Config, step: int) -> str:
    """Return a warning where there is too little room for the checkpoints to come, or "".

    Args:
        run: the run directory, which exists.
        config: the run's.
        step: that it goes on from.

    Raises:
        InputError: not even one has room.
    """
    size, free = checkpoint_bytes(config), shutil.disk_usage(run).free
    if free < size:
        raise InputError(
            f"a checkpoint takes {_in_units(size)}, but {run} has {_in_units(free)} left: free some space, or choose "
            "another --out"
        )
    count = checkpoints_to_come(config.training, step)
    if free >= count * size:
        return ""
    return (
        f"warning: {count} checkpoints to come take {_in_units(count * size)}, but {run} has {_in_units(free)} left: "
        f"--keep-last {max(1, free // size - 3)} keeps no more than that many"
    )


def _in_units(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
