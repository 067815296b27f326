"""Grids of samples while a run trains: when one is drawn, of how many images, and the drawing itself.

Beside those asked for by --sample-every and the one at the end, grids are drawn early, at round steps that lie ever
farther apart, as long as they cost little next to training. How many images a grid has follows from the configuration
and the step, not from a clock: equal runs draw equal grids. Every grid begins from the same noise, so that progress is
seen. Shapes: N images.
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
from ddpm_fast.runs.evaluation import ROUND_STEPS, is_round
from ddpm_fast.runs.grids import save_normalized_and_raw

SAMPLER = SamplerConfig("dpm++", 20)
"""Draws what DDIM takes two to three times the steps for."""
COUNTS = (64, 16, 4, 1)
"""Images of a grid: as many of these as time allows."""
LARGE_IMAGE = 64 * 64
"""Pixels above which 16 images are enough."""
OWN_SHARE, ASKED_SHARE = 0.25, 1.0
"""What a grid may cost, of the training since one was due: an early one, and one that was asked for."""
FIRST_FLOP = {"cpu": 2e10, "cuda": 2e13}
"""What the grid before the first step may cost: half a second, or so."""


def last_due(step: int, every: int) -> int:
    """Return the last step before this one at which a grid may be drawn: one that is round or asked for; or 0."""
    rounds = (n * 10**power for power in range(1, len(str(step))) for n in ROUND_STEPS)
    return max([0, (step - 1) // every * every, *(each for each in rounds if each < step)])


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

    def asked_for(self, last: bool) -> bool:
        """Return whether --sample-every asks for a grid now, at the last step or another."""
        every, step = self.config.training.sample_every, self.trainer.step
        return every > 0 and step > 0 and (last or step % every == 0)

    def images_due(self, last: bool) -> int:
        """Return how many images to draw now; 0 where no grid is due, or it was drawn already.

        Args:
            last: whether this is the run's last step.
        """
        step, every, asked = self.trainer.step, self.config.training.sample_every, self.asked_for(last)
        own = every > 0 and (step == 0 or is_round(step))
        if not (asked or own) or (self.directory / f"{self._stem}_raw.png").exists():
            return 0
        # A step of training costs each image three forward passes, and a grid each of its images one per step.
        share = ASKED_SHARE if asked else OWN_SHARE
        passes = share * 3 * self.config.training.batch_size * (step - last_due(step, every))
        if step == 0:
            passes = FIRST_FLOP[self.trainer.device.type] / self.trainer.unet.estimate_flop()
        return self._affordable(passes) or int(asked)

    def images_now(self) -> int:
        """Return how many images to draw for somebody who asks now: 0 where this step's grid is there."""
        if (self.directory / f"{self._stem}_raw.png").exists():
            return 0
        return self._affordable(ASKED_SHARE * 3 * self.config.training.batch_size * self.trainer.step) or 1

    def _affordable(self, passes: float) -> int:
        """Return the largest of `COUNTS` whose grid takes no more forward passes; 0 where a single image takes more."""
        unet = self.config.unet
        counts = COUNTS if unet.height * unet.width <= LARGE_IMAGE else COUNTS[1:]
        return next((count for count in counts if count * self.steps <= passes), 0)

    def seconds(self, count: int, seconds_per_step: float) -> float:
        """Estimate the time that a grid takes.

        Where none was timed yet it follows from the FLOPs on a CPU; a GPU is taken to be fast.
        """
        passes = count * self.steps
        if seconds_per_step:
            return passes * seconds_per_step / (3 * self.config.training.batch_size)
        if self.trainer.device.type != "cpu":
            return 0.0
        return passes * self.trainer.unet.estimate_flop() / (CPU_FLOP_RATE * torch.get_num_threads())

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

    def samples(self, count: int, labels: tuple[int, ...] = ()) -> Tensor:
        """Make images 0 to count - 1 of the run's seed from the averaged weights: [N, C, H, W].

        Args:
            count: how many.
            labels: of a conditional run's images 0, 1, ..., over and over; if left out, each in turn.

        Raises:
            MathematicsError: a sampled value is not finite.
        """
        with self.trainer.ema_weights() as averaged:
            if self.loop is None:  # eager: compiling would take longer than all grids
                table = sampler_table(self.config.diffusion, replace(SAMPLER, steps=self.steps))
                self.loop = SamplingLoop(averaged, table, self.trainer.dtype)
            else:
                self.loop.load_weights(averaged)
        labels = labels or tuple(range(self.config.unet.classes))
        return sample(self.loop, ImageRange(self.config.training.seed, 0, count, labels=labels), progress=self.bar)

    @property
    def _stem(self) -> str:
        return f"step-{self.trainer.step:07d}"
