"""A directory of samples: what made them, and which are there. One directory holds one kind; no image is made twice.

RUN/samples/SAMPLER-STEPS-seedSEED/
  000017.png     image 17, at the model's own resolution; or images.npz, images.tar
  grid.png       the first images of the directory, up to GRID_IMAGES
  samples.json   what made them, their numbers, and whether all that was asked for last is there ("complete")
  parts/         see `archives`

Images are written as they are made, each whole or not at all: what a killed process leaves is told by the files.
"""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddpm_fast.config import SamplerConfig
from ddpm_fast.data.image_files import is_picture
from ddpm_fast.engine.execution import choose_dtype
from ddpm_fast.errors import InputError
from ddpm_fast.files import parse_json, replace_file
from ddpm_fast.options import SampleFormat, SamplingOptions
from ddpm_fast.runs import checkpoint, origin
from ddpm_fast.runs.archives import Parts, pack
from ddpm_fast.runs.grids import Pixels, grid, save_image, save_picture
from ddpm_fast.runs.trained_model import Model

GRID_IMAGES = 100
END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
"""A PNG's last 12 bytes: what lacks them was torn by a machine that lost its power."""
ONE_BY_ONE = re.compile(r"\d{6,10}\.png")
WRITTEN = ("images.npz", "images.tar", "parts")
"""What is written or taken up again beside pictures, and in a directory without a samples.json is somebody's own."""
DIGESTS = {"checkpoint_digest": "other weights", "code_digest": "other code", "guide_digest": "another guide"}
"""What a difference of these means, whose values tell nobody anything."""

Kind = dict[str, Any]
"""Everything that images depend on beside their numbers, and the format that they are kept in."""


def precision_of(model: Model) -> str:
    """Return what a model computes in: "fp32", "tf32" or "bf16"."""
    if model.options.precision != "auto":
        return model.options.precision
    return "bf16" if choose_dtype("auto", model.device) == torch.bfloat16 else "fp32"


def kind_of(model: Model, wanted: SamplingOptions, format: SampleFormat) -> Kind:
    """Return what decides the images that a model makes, and how they are kept."""
    kind: Kind = {"seed": wanted.seed, **asdict(wanted.sampler_for(model.config)), "weights": model.options.weights}
    kind |= {"precision": precision_of(model), "checkpoint_step": model.step}
    kind |= {"checkpoint_digest": _digest_of(model), "code_digest": origin.images_digest(), "format": format}
    labels = model.labels_for(wanted)
    if labels:
        kind["label"] = list(labels)
    if wanted.guidance != 1:
        kind |= {"guidance": wanted.guidance, "guide_digest": _digest_of(model.guide) if model.guide else ""}
    if format != "png":  # an archive is written once, with all its images
        kind |= {"first_index": wanted.first_index, "count": wanted.count}
    return kind


def _digest_of(model: Model) -> str:
    """Return a digest of a checkpoint's weights and its configuration."""
    digests = []
    for path in model.files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, hashlib.blake2b).hexdigest())
    return hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()


def how(model: Model, sampler: SamplerConfig) -> str:
    """Name what a model samples by: the sampler and its steps, and whatever else is not the default."""
    names = [sampler.sampler, str(sampler.steps)]
    names += [f"eta{sampler.eta:g}"] if sampler.eta else []
    names += [sampler.spacing] if sampler.spacing != SamplerConfig.spacing else []
    names += [model.options.weights] if model.options.weights != "ema" else []
    default = "bf16" if choose_dtype("auto", model.device) == torch.bfloat16 else "fp32"
    names += [precision_of(model)] if precision_of(model) != default else []
    return "-".join(names)


def default_directory(model: Model, wanted: SamplingOptions, kind: Kind) -> Path:
    """Return the run's directory for samples of a kind, which holds no others: its name, or the first NAME-N that fits.

    Other samples of that name are those of another step, or of other code.
    """
    run = model.home
    name = f"{how(model, wanted.sampler_for(model.config))}-seed{wanted.seed}{wanted.asked}"
    newest = checkpoint.newest(run, (model.part,)) if run != model.path else None
    if newest is not None and newest.step != model.step:
        name += f"-step{model.step:07d}"
    if kind["format"] != "png":
        name += f"-{wanted.first_index}to{wanted.first_index + wanted.count - 1}-{kind['format']}"
    for number in itertools.count(1):
        directory = run / "samples" / (name if number == 1 else f"{name}-{number}")
        if not differing(directory, kind):
            return directory
    raise AssertionError


def differing(directory: Path, kind: Kind) -> str:
    """Return what the samples in a directory differ in from a kind; "" where they do not, or there are none."""
    file = directory / "samples.json"
    if not file.exists():
        return "a samples.json is missing" if _holds_images(directory) else ""
    try:
        there = dict(parse_json(file.read_text()))
    except (OSError, ValueError, TypeError):
        return "their samples.json cannot be read"
    unlike = [name for name, value in kind.items() if there.get(name) != value]
    return ", ".join(DIGESTS.get(name, f"{name} {there.get(name)} and not {kind[name]}") for name in unlike)


def require_same_kind(directory: Path, kind: Kind) -> None:
    """Refuse a directory that holds samples of another kind.

    Raises:
        InputError: it does.
    """
    unlike = differing(directory, kind)
    if unlike:
        raise InputError(f"--out {directory} holds other images ({unlike}): name another --out")


def _holds_images(directory: Path) -> bool:
    """Say whether there is any picture, ours or not: samples beside somebody's own would be trained on with them."""
    files = directory.iterdir() if directory.is_dir() else ()
    return any(is_picture(file) or file.name in WRITTEN for file in files)


def _is_whole(png: Path) -> bool:
    with contextlib.suppress(OSError), png.open("rb") as file:
        file.seek(-len(END_OF_PNG), 2)
        return file.read() == END_OF_PNG
    return False


def _read(png: Path) -> Pixels:
    """Return an image's pixels.

    Raises:
        InputError: it cannot be decoded.
    """
    try:
        return np.asarray(Image.open(png))
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: how Pillow finds a chunk broken
        raise InputError(f"{png} is damaged ({error}): delete it, and the same command makes it again") from None


def ranges(numbers: set[int]) -> list[tuple[int, int]]:
    """Return numbers as ranges of first and last."""
    found = list[tuple[int, int]]()
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


class Samples:
    """A directory that images of one kind are written into, as they are made."""

    def __init__(self, directory: Path, kind: Kind, wanted: SamplingOptions) -> None:
        """Look what is there, without writing anything.

        Args:
            directory: which holds images of this kind, or none.
            kind: of the images.
            wanted: which of them shall be there in the end.
        """
        self.directory, self.kind, self.wanted = directory, kind, wanted
        self.parts, self.archive = Parts(directory / "parts"), directory / f"images.{kind['format']}"
        self.asked = range(wanted.first_index, wanted.first_index + wanted.count)
        self.packed = kind["format"] != "png"
        self.there = self._find()
        self.found, self._begun = len(self.there & set(self.asked)), False

    def _find(self) -> set[int]:
        if self.packed:
            return set(self.asked) if self.archive.exists() else self.parts.numbers()
        files = self.directory.iterdir() if self.directory.is_dir() else ()
        return {int(file.stem) for file in files if ONE_BY_ONE.fullmatch(file.name) and _is_whole(file)}

    @property
    def missing(self) -> int:
        """How many of the images that were asked for are not there."""
        return sum(number not in self.there for number in self.asked)

    def add(self, first: int, pixels: Pixels) -> None:
        """Write a batch [N, H, W, C], but for the images that are there.

        Raises:
            InputError: it cannot be written.
        """
        if not self._begun:  # so that nothing is left by what ended before its first batch
            self._describe(complete=False)
            self._begun = True
        if self.packed:
            self.parts.add(first, pixels)
            self.there |= set(range(first, first + len(pixels)))
            return
        for number, image in enumerate(pixels, start=first):
            if number not in self.there:
                save_image(self.directory / f"{number:06d}.png", image)
                self.there.add(number)

    def finish(self, facts: Mapping[str, Any], progress: bool | None) -> None:
        """Draw the grid, pack what is to be packed, and say that all is there.

        Args:
            facts: what else samples.json says.
            progress: show a bar, or say a line now and then; None for neither.

        Raises:
            InputError: it cannot be written.
        """
        if not self.packed:
            shown = sorted(self.there)[:GRID_IMAGES]
            pictures = [_read(self.directory / f"{number:06d}.png") for number in shown]
            self._draw(np.stack([each.reshape(*each.shape[:2], -1) for each in pictures]))
        elif not self.archive.exists():
            first, count = self.wanted.first_index, self.wanted.count
            self._draw(np.concatenate(list(self.parts.batches(first, min(count, GRID_IMAGES)))))
            pack(self.archive, self.parts, first, count, progress)
        self._describe(complete=True, facts=facts)
        self.parts.remove()

    def _draw(self, pixels: Pixels) -> None:
        save_picture(self.directory / "grid.png", grid(pixels))

    def _describe(self, complete: bool, facts: Mapping[str, Any] | None = None) -> None:
        asked = {"first_index": self.wanted.first_index, "count": self.wanted.count}
        said = {"complete": complete, "images": ranges(self.there), **self.kind, **asked, **(facts or {})}
        replace_file(self.directory / "samples.json", checkpoint.to_json(said))
