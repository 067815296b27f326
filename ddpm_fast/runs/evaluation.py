"""The evaluation loss: every run is asked about the same images, noise and noise levels, so that runs can be compared.

A prediction splits x_t = signal * x0 + noise * eps into what it takes for signal and what it takes for noise. The two
add up to x_t, so both are off by the same: signal^2 times the squared error of x0 is noise^2 times that of eps. This
error is finite at any noise level, means the same for eps, v and x0, and is what the evaluation loss averages.

The addresses are fixed: image, noise and log SNR of address i are the same in every run, whatever its seed. However
many addresses are taken, their log SNRs fill -9..9 evenly; each is evaluated at the schedule's nearest timestep.
Shapes: M images of the data set, N addresses, C channels, H x W pixels, T diffusion timesteps.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ddpm_fast.config import Config, DiffusionConfig
from ddpm_fast.constants import TRAINING_COLUMN, TrainingTable
from ddpm_fast.data.batches import split
from ddpm_fast.data.conditions import class_labels
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import key_from_seed, permutation
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.engine.networks import sampling_copy
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.files import replace_file
from ddpm_fast.model.unet import UNet

ADDRESSES, EARLY_ADDRESSES = 512, 128
"""What is evaluated, and what of it early on, when little has been trained yet."""
EARLY_STEPS, FIRST_STEP = 100, 10
"""The early part of a run, and the first step that is worth a look."""
LARGEST_LOG_SNR = 9.0
BANDS = 5
"""Equal parts of the log SNRs, from almost pure noise to almost none."""
LARGEST_BATCH = 128
SEED = 0x6576616C
"""Of the addresses' images and noise."""
GOLDEN_RATIO = (5**0.5 - 1) / 2
ROUND_STEPS = (1, 2, 5)
ROUND_SHARE, REGULAR_SHARE = 0.15, 0.005
"""The time that an evaluation at a round step may take, of training's so far; and those at regular intervals."""


@dataclass(frozen=True)
class Evaluation:
    """What a network was off at each address, and which addresses these were."""

    errors: Mapping[str, Tensor]
    """For "ema" and "raw" weights, and "training_ema" beside a hold-out: [N] float32."""
    image: Tensor
    """[N] int64, the number of each address's image in the data set."""
    log_snr: Tensor
    """[N] float32, that of the timestep which was evaluated: the schedule's nearest to the address's own."""


def log_snrs(count: int) -> Tensor:
    """Return the first addresses' log SNRs: [N] float64, evenly over the range however many they are."""
    turns = torch.arange(count, dtype=torch.float64) * GOLDEN_RATIO + 0.5
    return (2 * (turns % 1) - 1) * LARGEST_LOG_SNR


def bands(count: int) -> Tensor:
    """Return the band of each address, 0 (noisiest) to BANDS - 1: [N] int64."""
    return ((log_snrs(count) / LARGEST_LOG_SNR + 1) / 2 * BANDS).long().clamp(0, BANDS - 1)


def split_table(config: DiffusionConfig) -> Tensor:
    """Return the training table whose weights turn the error of a prediction into that of the split: [T, 5] float32.

    From x_t = signal * x0 + noise * eps and target = target_eps * eps + target_x_start * x0 follows that the signal is
    off by signal * noise / (signal * target_eps - noise * target_x_start) times what the target is off.
    """
    table = training_table(config, dtype=torch.float64)
    row = TrainingTable(*table.unbind(1))
    error = row.signal * row.noise / (row.signal * row.target_eps - row.noise * row.target_x_start)
    table[:, TRAINING_COLUMN.weight] = error.square()
    return table.float()


def nearest_timesteps(config: DiffusionConfig, count: int) -> tuple[Tensor, Tensor]:
    """Return the schedule's timesteps that are nearest to the addresses' log SNRs: [N] int64, and theirs, [N]."""
    row = TrainingTable(*training_table(config, dtype=torch.float64).unbind(1))
    of_schedule = 2 * (row.signal.log() - row.noise.log())
    t = (log_snrs(count)[:, None] - of_schedule).abs().argmin(dim=1)
    return t, of_schedule[t].float()


def examples_at(step: int) -> int:
    """Return how many addresses are evaluated after a step."""
    return EARLY_ADDRESSES if step < EARLY_STEPS else ADDRESSES


def is_round(step: int) -> bool:
    """Return whether a step is 10, 20, 50, 100, 200, 500, ..."""
    power = 10 ** (len(str(step)) - 1)
    return step >= FIRST_STEP and step // power in ROUND_STEPS and step % power == 0


def is_due(step: int, config: Config) -> bool:
    """Return whether to evaluate after a step: at round steps and regularly, as far as it costs little.

    A network's forward pass takes a third of the time of a step on as many images. The regular interval is the least
    round one that REGULAR_SHARE allows, so that runs of one batch size meet, and others often.
    """
    passes = 3 if config.data.holdout else 2
    steps_per_address = passes / (3 * config.training.batch_size)
    if is_round(step) and examples_at(step) * steps_per_address <= ROUND_SHARE * step:
        return True
    least = ADDRESSES * steps_per_address / REGULAR_SHARE
    interval = next(n * 10**power for power in range(9) for n in ROUND_STEPS if n * 10**power >= least)
    return step > 0 and step % interval == 0


class EvaluationSet:
    """A data set's images at the addresses, and what a network makes of them."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device) -> None:
        """Take the images that are held out, or else those that are trained on."""
        trained, held_out = split(len(dataset), config.data.holdout)
        self._key = key_from_seed(SEED, device)
        # Without gradients, four times as many images fit into memory as a training step takes at once.
        self._batch = min(LARGEST_BATCH, 4 * config.training.batch_size // config.training.accumulate)
        self._table = split_table(config.diffusion).to(device)
        t, self._log_snr = nearest_timesteps(config.diffusion, ADDRESSES)
        self._t, self._numbers = t.to(device), torch.arange(ADDRESSES, device=device)
        self.rows = _choose(held_out if len(held_out) else trained)
        labels = class_labels(config, dataset)

        def at_addresses(rows: Tensor) -> tuple[Tensor, ...]:
            of_rows = () if labels is None else (torch.from_numpy(labels)[rows],)
            return tuple(values.to(device) for values in (_images_of(dataset, rows), *of_rows))

        self._examples = at_addresses(self.rows)
        self._training_examples = at_addresses(_choose(trained)) if len(held_out) else None

    def halve_batches(self) -> bool:
        """Take half as many images at once from now on; return False where that is one already."""
        self._batch, before = -(-self._batch // 2), self._batch
        return before > 1

    def evaluate(self, trainer: Trainer) -> Evaluation:
        """Return what averaged and last weights are off now."""
        count, errors = examples_at(trainer.step), dict[str, Tensor]()
        self._batch = min(self._batch, 4 * len(trainer.images) // trainer.accumulate)  # where steps were healed
        with trainer.ema_weights() as averaged:
            errors["ema"] = self._errors(averaged, trainer.dtype, count, *self._examples)
            if self._training_examples is not None:
                errors["training_ema"] = self._errors(averaged, trainer.dtype, count, *self._training_examples)
        errors["raw"] = self._errors(trainer.unet, trainer.dtype, count, *self._examples)
        return Evaluation(errors, self.rows[:count], self._log_snr[:count])

    @torch.no_grad()
    def _errors(
        self, unet: UNet, dtype: torch.dtype, count: int, images: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return the error at each of the first addresses, without dropout and flips: [N] float32 on the CPU."""
        network, errors = sampling_copy(unet, dtype), []
        for first in range(0, count, self._batch):
            part = slice(first, min(first + self._batch, count))
            t, told = self._t[part], None if labels is None else labels[part]
            example = (images[part], t, self._table, self._key, self._numbers[part])
            x_t = network.ops.q_sample(*example, dtype=dtype)
            prediction = network.denoise(x_t, unet.time_shifts(t, told).to(dtype))
            errors.append(network.ops.noise_mse(prediction, *example))
        return torch.cat(errors).float().cpu()


def _choose(rows: Tensor) -> Tensor:
    """Return which image each address has, of those in `rows`: [N] int64, all once before one comes again."""
    order = rows[permutation(key_from_seed(SEED), 0, len(rows))]
    return order[torch.arange(ADDRESSES) % len(order)]


def _images_of(dataset: Dataset, rows: Tensor) -> Tensor:
    """Return images of the data set, [N, C, H, W] uint8 laid out as NHWC."""
    return torch.from_numpy(np.stack([dataset.images[int(row)] for row in rows])).permute(0, 3, 1, 2)


def summary(evaluated: Evaluation) -> dict[str, Any]:
    """Return what metrics.jsonl says of an evaluation: the means, and the averaged weights' mean by band."""
    means = {name: float(values.double().mean()) for name, values in evaluated.errors.items()}
    return {**means, "bands": by_band(evaluated.errors["ema"])}


def in_words(found: Mapping[str, Any]) -> str:
    """Return a summary as the progress line shows it, with the bands from almost pure noise to almost none."""
    in_bands = " ".join(f"{value:.2g}" for value in found["bands"])
    trained_on = f", of training images {found['training_ema']:.4f}" if "training_ema" in found else ""
    return f"evaluation {found['ema']:.4f} ({in_bands}){trained_on}"


def by_band(values: Tensor, counted: Tensor | None = None) -> list[float]:
    """Return the mean of values [N] in each band, from almost pure noise to almost none; of those that are counted.

    NaN where a band has none.
    """
    of_address = bands(len(values))
    of_address = of_address if counted is None else torch.where(counted, of_address, -1)
    return [float(values[of_address == band].double().mean()) for band in range(BANDS)]


def _path(run: Path, step: int) -> Path:
    return run / "evaluation" / f"step-{step:07d}.safetensors"


def write(run: Path, step: int, evaluated: Evaluation) -> None:
    """Keep an evaluation in a run's directory.

    Raises:
        InputError: it cannot be written.
    """
    tensors = {**evaluated.errors, "image": evaluated.image, "log_snr": evaluated.log_snr}
    replace_file(_path(run, step), safetensors.torch.save({name: each.contiguous() for name, each in tensors.items()}))


def evaluated_steps(run: Path) -> list[int]:
    """Return the steps of a run that were evaluated, in order."""
    steps = []
    for file in (run / "evaluation").glob("step-*.safetensors"):
        with contextlib.suppress(ValueError):
            steps.append(int(file.stem.removeprefix("step-")))
    return sorted(steps)


def read(run: Path, step: int) -> Evaluation | None:
    """Return what an evaluation found; None where there is none, or it is damaged."""
    try:
        tensors = safetensors.torch.load_file(_path(run, step))
        image, log_snr = tensors.pop("image"), tensors.pop("log_snr")
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
    wanted = dict.fromkeys(("ema", "raw"), torch.float32)
    found = {"image": image, "log_snr": log_snr, **tensors}
    kinds = {"image": torch.int64, "log_snr": torch.float32, **wanted}
    fits = found.keys() >= kinds.keys() and all(found[name].dtype == kinds[name] for name in kinds)
    same = {tuple(each.shape) for each in found.values()} == {(image.numel(),)}
    return Evaluation(tensors, image, log_snr) if fits and same and image.numel() else None


def cut_back(run: Path, step: int) -> None:
    """Remove what was evaluated after a step, from which the run starts again."""
    for later in evaluated_steps(run):
        if later > step:
            _path(run, later).unlink()
