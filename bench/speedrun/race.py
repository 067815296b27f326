"""Loops train in turns on one machine; what they have learnt is judged with the clock stopped."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.speedrun.loops import OURS, Loop
from bench.speedrun.tracks import Track
from ddpm_fast.config import Config
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import choose_dtype
from ddpm_fast.engine.sampling import ImageRange, SamplingLoop, sample
from ddpm_fast.engine.trainer import new_unet
from ddpm_fast.runs.grids import to_uint8

TURN_SECONDS = 2.0
"""Loops train this long, one after the other: a machine that slows down does so for all of them."""
PATIENCE = 4
"""A loop that is not there after so many times the engine's training time is reported by its best."""
LARGEST_BATCH = 100
"""Images that are sampled at once."""

Scores = Mapping[str, float]
Judge = Callable[[NDArray[np.uint8]], Scores]


@dataclass(frozen=True)
class Standing:
    """Where a loop stood when it was judged."""

    loop: str
    seed: int
    seconds: float
    """Of training."""
    steps: int
    images: int
    """Trained on, repetitions counted."""
    scores: Scores
    """By name, without the sample count."""
    reached: bool


class Lane:
    """A loop with its own clock."""

    def __init__(self, name: str, loop: Loop) -> None:
        self.name, self.loop = name, loop
        self.seconds, self.steps = 0.0, 0

    @property
    def finished(self) -> bool:
        """Are all steps of its recipe done."""
        return self.steps >= self.loop.config.training.steps

    def train(self, seconds: float) -> None:
        """Take steps for about so many seconds, at least one, unless the recipe ends."""
        end = self.seconds + seconds
        while self.seconds < end and not self.finished:
            started = time.perf_counter()
            self.loop.step()
            self.seconds += time.perf_counter() - started
            self.steps += 1

    def judged(self, track: Track, judge: Judge) -> Standing:
        """Sample what was learnt so far, and score it; the clock stands."""
        config = self.loop.config
        suffix = f"_{track.count}"
        found = judge(draw(config, self.loop.weights(), track))
        scores = {name.removesuffix(suffix): value for name, value in found.items()}
        reached = all(target.met(scores[target.score]) for target in track.targets)
        images = self.steps * config.training.batch_size
        return Standing(self.name, config.training.seed, self.seconds, self.steps, images, scores, reached)


def draw(config: Config, weights: Mapping[str, Tensor], track: Track) -> NDArray[np.uint8]:
    """Make the images of a track from a loop's weights: [count, H, W, C]."""
    device = next(iter(weights.values())).device
    unet = new_unet(config, device).requires_grad_(False).eval()
    unet.load_state_dict(dict(weights))
    loop = SamplingLoop(unet, sampler_table(config.diffusion, track.sampler), choose_dtype("auto", device))
    images = ImageRange(config.training.seed, 0, track.count)
    return np.asarray(to_uint8(sample(loop, images, LARGEST_BATCH)))


def race(loops: Mapping[str, Loop], track: Track, judge: Judge) -> Iterator[Standing]:
    """Train loops in turns, the engine among them; yield where they stand when it is done, and the others later.

    Args:
        loops: by name; all share a seed.
        track: what is raced for.
        judge: scores images [N, H, W, C].

    Yields:
        The engine's standing, then the others' at 1, 2, 3 and 4 times its training time, until they reach the target
        or come to the end of their own recipe.
    """
    lanes = [Lane(name, loop) for name, loop in loops.items()]
    ours = next(lane for lane in lanes if lane.name == OURS)
    while not ours.finished:
        for lane in lanes:
            lane.train(TURN_SECONDS)
    yield ours.judged(track, judge)
    racing = [lane for lane in lanes if lane is not ours]
    for times in range(1, PATIENCE + 1):
        while any(lane.seconds < times * ours.seconds and not lane.finished for lane in racing):
            for lane in racing:
                lane.train(min(TURN_SECONDS, times * ours.seconds - lane.seconds))
        for lane in list(racing):
            standing = lane.judged(track, judge)
            yield standing
            if standing.reached or lane.finished:
                racing.remove(lane)
