"""Grids of samples while a run trains: when one is drawn, of how many images, and the drawing itself.

Beside those asked for by --sample-every and the one at the end, grids are drawn early, at round steps that lie ever
farther apart, as long as they cost little next to training. Every grid begins from the same noise, so that progress
is seen. Shapes: N images.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ddpm_fast.config import Config, SamplerConfig
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import CPU_FLOP_RATE
from ddpm_fast.engine.sampling import ImageRange, SamplingLoop, sample
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.files import writing
from ddpm_fast.runs.evaluation import is_round
from ddpm_fast.runs.grids import save_normalized_and_raw

SAMPLER = SamplerConfig("dpm++", 20)
"""Draws what DDIM takes two to three times the steps for."""
COUNTS = (64, 16, 4, 1)
"""Images of a grid: as many of these as time allows."""
LARGE_IMAGE = 64 * 64
"""Pixels above which 16 images are enough."""
OWN_SHARE, ASKED_SHARE = 0.25, 1.0
"""The time that a grid may take, of the training since the last: an early one, and one that was asked for."""
FIRST_SECONDS = 0.5
"""The time that the grid before the first step may take."""


class Previews:
    """Draws a run's grids into its directory."""

    def __init__(self, config: Config, directory: Path, trainer: Trainer, bar: bool) -> None:
        """Prepare to draw.

        Args:
            config: the run's.
            directory: of the run.
            trainer: whose averaged weights are drawn from.
            bar: show one.
        """
        self.config, self.directory, self.trainer, self.bar = config, directory / "samples", trainer, bar
        self.steps = min(SAMPLER.steps, config.diffusion.timesteps)
        self.loop: SamplingLoop | None = None
        self._training_seconds = 0.0  # when the last grid was drawn

    def asked_for(self, last: bool) -> bool:
        """Return whether --sample-every asks for a grid now, at the last step or another."""
        every, step = self.config.training.sample_every, self.trainer.step
        return every > 0 and step > 0 and (last or step % every == 0)

    def images_due(self, last: bool, training_seconds: float, seconds_per_step: float) -> int:
        """Return how many images to draw now; 0 where no grid is due, or it was drawn already.

        Args:
            last: whether this is the run's last step.
            training_seconds: that the run has trained.
            seconds_per_step: of training; 0 where that is not known yet.
        """
        step, asked = self.trainer.step, self.asked_for(last)
        own = self.config.training.sample_every > 0 and (step == 0 or is_round(step))
        if not (asked or own) or (self.directory / f"{self._stem}_raw.png").exists():
            return 0
        seconds = (training_seconds - self._training_seconds) * (ASKED_SHARE if asked else OWN_SHARE)
        count = self._affordable(FIRST_SECONDS if step == 0 else seconds, seconds_per_step) or int(asked)
        if count:
            self._training_seconds = training_seconds
        return count

    def seconds(self, count: int, seconds_per_step: float) -> float:
        """Estimate the time that a grid takes: a step of training costs each image three forward passes.

        Where none was timed yet it follows from the FLOPs on a CPU; a GPU is taken to be fast.
        """
        passes = count * self.steps
        if seconds_per_step:
            return passes * seconds_per_step / (3 * self.config.training.batch_size)
        if self.trainer.device.type != "cpu":
            return 0.0
        return passes * self.trainer.unet.estimate_flop() / (CPU_FLOP_RATE * torch.get_num_threads())

    def _affordable(self, seconds: float, seconds_per_step: float) -> int:
        """Return the largest of `COUNTS` that may be drawn in some time; 0 where a single image takes longer."""
        unet = self.config.unet
        counts = COUNTS if unet.height * unet.width <= LARGE_IMAGE else COUNTS[1:]
        return next((count for count in counts if self.seconds(count, seconds_per_step) <= seconds), 0)

    def draw(self, count: int) -> Tensor:
        """Draw a grid from the averaged weights, normalized and raw; return its samples [N, C, H, W].

        Raises:
            MathematicsError: a sampled value is not finite.
            InputError: it cannot be written.
        """
        samples = self.samples(count)
        with writing(self.directory):
            self.directory.mkdir(exist_ok=True)
        save_normalized_and_raw(samples, self.directory, self._stem)
        return samples

    def samples(self, count: int) -> Tensor:
        """Make images 0 to count - 1 of the run's seed from the averaged weights: [N, C, H, W].

        Raises:
            MathematicsError: a sampled value is not finite.
        """
        with self.trainer.ema_weights() as averaged:
            if self.loop is None:  # eager: compiling would take longer than all grids
                table = sampler_table(self.config.diffusion, replace(SAMPLER, steps=self.steps))
                self.loop = SamplingLoop(averaged, table, self.trainer.dtype)
            else:
                self.loop.load_weights(averaged)
        return sample(self.loop, ImageRange(self.config.training.seed, 0, count), progress=self.bar)

    @property
    def _stem(self) -> str:
        return f"step-{self.trainer.step:07d}"
