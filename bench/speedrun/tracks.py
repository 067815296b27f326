"""What is raced for: the data, the quality that counts as reached, the sampler, and the rules.

The rules of every track: the clock runs while steps are taken, and at no other time; a tenth of the images is held
out, so that copying shows; what was chosen was chosen with seeds 0 to 2, and a record is the mean of seeds 3 to 5;
its target is met by that mean, and so is a second one by which nothing was chosen.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ddpm_fast.config import Config, SamplerConfig
from ddpm_fast.errors import InputError, nearest
from ddpm_fast.presets import PRESETS

HOLDOUT = 0.1
"""The share of the images that nobody trains on."""
CHOSEN_WITH, JUDGED_WITH = (0, 1, 2), (3, 4, 5)
"""Seeds."""
LEAST_DISTANCE = 0.8
"""Samples whose median distance to the nearest training image is below this share of held-out images' are copies."""


@dataclass(frozen=True)
class Target:
    """A bound on one of the evaluator's scores."""

    score: str
    """The score's name without its sample count."""
    bound: float
    least: bool = False
    """Whether the score must be at least the bound, and not at most."""

    def met(self, value: float) -> bool:
        """Return whether a score is good enough; NaN is not."""
        return value >= self.bound if self.least else value <= self.bound

    def __str__(self) -> str:
        return f"{self.score.replace('_', ' ')} {'>=' if self.least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Track:
    """One race."""

    name: str
    preset: str
    """The recipe that is raced, and the network of all loops."""
    targets: tuple[Target, ...]
    """What counts as reached."""
    second: Target
    """By which nothing was chosen."""
    sampler: SamplerConfig
    """Makes the images that are judged, for all loops."""
    count: int = 1000
    """Images that are judged."""
    own_data: bool = False
    """Whether the preset brings its data."""

    def config(self, data: str) -> Config:
        """Return the recipe on the given data.

        Raises:
            InputError: no data is given, and the track has none of its own.
        """
        if not data and not self.own_data:
            raise InputError(f"track {self.name} needs --data: name a .npy/.npz file or a folder of images")
        config = PRESETS[self.preset]
        part = dataclasses.replace(config.data, data=data or config.data.data, holdout=HOLDOUT)
        return dataclasses.replace(config, data=part)


DDIM_50, DPM_20 = SamplerConfig("ddim", 50), SamplerConfig("dpm++", 20)
TRACKS = {
    track.name: track
    for track in (
        Track(
            "digits",
            "digits",
            (Target("frechet_pixels", 0.5), Target("confident", 0.7, least=True)),
            Target("frechet_features", 3.5),
            DDIM_50,
            own_data=True,
        ),
        Track(
            "mnist",
            "mnist",
            (Target("frechet_pixels", 12), Target("confident", 0.7, least=True)),
            Target("frechet_features", 3),
            DPM_20,
        ),
        Track("emoji", "icons32", (Target("frechet_pixels", 60),), Target("frechet_features", 3), DPM_20),
        # For a GPU: nobody has raced yet, and the bounds are guesses.
        Track(
            "cifar10",
            "cifar10-fast",
            (Target("frechet_pixels", 10),),
            Target("frechet_features", 1),
            DPM_20,
            count=10_000,
        ),
    )
}


def track_named(name: str) -> Track:
    """Return the track of that name.

    Raises:
        InputError: there is none; the nearest is suggested.
    """
    if name not in TRACKS:
        raise InputError(f"unknown track {name!r}: the tracks are {', '.join(TRACKS)}.{nearest(name, TRACKS)}")
    return TRACKS[name]


def file_name(data: str) -> str:
    """Return what a record calls the data: the last part of its path, which says nothing of whose machine it was."""
    return Path(data).name
