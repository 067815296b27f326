"""A checkpoint's U-Net, ready to make images.

Shapes: N images, C channels, H x W pixels, T diffusion timesteps.
"""

import dataclasses
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import torch
from torch import Tensor

from ddpm_fast.config import Config, Precision, SamplerConfig, SamplerName, Spacing
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import Execution, choose_dtype, choose_execution, set_tf32
from ddpm_fast.engine.sampling import ImageRange, OnStep, SamplingLoop
from ddpm_fast.engine.sampling import stream as stream_images
from ddpm_fast.errors import InputError, require_known
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import choose_ops
from ddpm_fast.options import LoadOptions, SamplingOptions
from ddpm_fast.runs import checkpoint, diffusers_folder
from ddpm_fast.runs.asked import labels_asked, require_fitting
from ddpm_fast.runs.device import enough_memory, prepare_device, require_precision
from ddpm_fast.runs.grids import Images, to_uint8

Options = TypeVar("Options", LoadOptions, SamplingOptions)


class LoadKeywords(TypedDict, total=False):
    """The fields of `LoadOptions`, whose defaults hold."""

    weights: Literal["ema", "raw"]
    device: Literal["auto", "cpu", "cuda"]
    precision: Precision
    kernels: bool
    compile: bool
    capture: bool


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions` but its count, whose defaults hold."""

    sampler: Literal["auto", SamplerName]
    steps: int
    eta: float
    spacing: Spacing
    seed: int
    first_index: int
    batch_size: int
    label: int | Sequence[int]
    guidance: float
    guide: str | Path


def options_from(cls: type[Options], keywords: Mapping[str, Any]) -> Options:
    """Build options from keywords.

    Raises:
        InputError: a keyword is unknown (the nearest is suggested), or a value is refused.
    """
    require_known("keyword", keywords, [f.name for f in dataclasses.fields(cls)])
    values = dict(keywords)
    if "label" in values:
        values["label"] = (values["label"],) if isinstance(values["label"], int) else tuple(values["label"])
    if "guide" in values:
        values["guide"] = str(values["guide"])
    return cls(**values)


class Model:
    """A trained U-Net that makes images."""

    unet: UNet
    """The module, on its device: sampling follows changes of its weights."""
    config: Config
    """What the run computes."""
    step: int
    """Optimizer steps after which the weights were saved."""
    guide: "Model | None"
    """What guided it last, if that was another model."""
    fingerprint: str
    """Of the images that the run trains on."""
    files: list[Path]
    """What decides its images."""
    home: Path
    """Where they are kept."""

    def __init__(self, run: Path, options: LoadOptions) -> None:
        """Load a run's newest checkpoint, a checkpoint, or a diffusers model; see `ddpm_fast.load`."""
        self.part = part = "ema" if options.weights == "ema" else "model"
        found = diffusers_folder.resolve(run, (part,))
        self.path, self.config, self.step, self.options = found.path, found.config, found.step, options
        self.fingerprint, self.files = found.fingerprint, found.files(part)
        self.home = diffusers_folder.home_of(run, found)
        self.device = prepare_device(options.device, options.precision)
        require_precision(options.precision, self.device)
        unet = unet_of(found, part).to(self.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.unet = unet.requires_grad_(False).eval().use(choose_ops(options.kernels, self.device))
        self.loop: SamplingLoop | None = None
        self._wish: tuple[SamplerConfig, Execution, UNet | None] | None = None  # what the loop was made for
        self._choosing = threading.RLock()
        self.guide = None
        self._guide_name = ""

    def __repr__(self) -> str:
        unet = self.config.unet
        shape = f"{unet.image_channels}x{unet.height}x{unet.width}"
        return f"<Model {self.path}: {self.options.weights} weights of step {self.step}, {shape}, on {self.device}>"

    @overload
    def sample(
        self,
        count: int = ...,
        *,
        return_tensor: Literal[False] = ...,
        progress: bool = ...,
        **keywords: Unpack[SamplingKeywords],
    ) -> Images: ...

    @overload
    def sample(
        self,
        count: int = ...,
        *,
        return_tensor: Literal[True],
        progress: bool = ...,
        **keywords: Unpack[SamplingKeywords],
    ) -> Tensor: ...

    def sample(
        self,
        count: int = SamplingOptions.count,
        *,
        return_tensor: bool = False,
        progress: bool = True,
        **keywords: Unpack[SamplingKeywords],
    ) -> Images | Tensor:
        """Make images, by number: image 17 of a seed is the same whatever else is asked for.

        What was compiled and captured for a sampler is kept until another one is asked for. Threads may share a model:
        they take turns, batch by batch.

        Args:
            count: how many.
            return_tensor: return numbers, not pictures.
            progress: show a bar.
            keywords:
                seed: 0 to 2**64 - 1, default 0.
                sampler: "auto", the run's own and the default; "ddpm", the paper's; "ddim" or "dpm++" need far fewer
                    steps.
                steps: 1 to T; the default, 0, is those of the run's own sampler, or all T of one that is named.
                eta: DDIM's share of fresh noise, 0 (the default) to 1; for a sampler that is named.
                spacing: which timesteps such a sampler visits, "trailing" (the default), "leading" or "linspace".
                first_index: number of the first image, default 0.
                batch_size: largest number of images made at once, default 64.
                label: of a conditional model, what to make: 7, or [0, 1, 2], of which image i gets the i-th, over and
                    over; -1 is none. The default is every label in turn.
                guidance: how strongly to guide, default 1, not at all: by the model itself without the label,
                guide: or by another run, a worse one.

        Returns:
            A list of Pillow images of the model's resolution, of mode L, LA, RGB or RGBA; or
            [N, C, H, W] float32 on the CPU, black to white as -1 to 1, not clipped beyond what the sampler did.

        Raises:
            InputError: a keyword or value is refused, or memory does not suffice.
            MathematicsError: a value is not finite.
        """
        samples = self.draw(options_from(SamplingOptions, {"count": count, **keywords}), True if progress else None)
        return samples if return_tensor else Images(to_uint8(samples))

    def stream(
        self, count: int = SamplingOptions.count, *, progress: bool = True, **keywords: Unpack[SamplingKeywords]
    ) -> Iterator[tuple[int, Images]]:
        """Make the images that `sample` makes, batch by batch: memory holds one, however many are asked for.

        Args:
            count, progress, keywords: see `sample`.

        Yields:
            The number of a batch's first image, and the batch, a list of Pillow images.

        Raises:
            InputError: a keyword or value is refused, or memory does not suffice.
            MathematicsError: a value is not finite.
        """
        wanted = options_from(SamplingOptions, {"count": count, **keywords})
        batches = self.batches(wanted, True if progress else None)  # which refuses now, and not at the first batch
        return ((first, Images(to_uint8(x))) for first, x in batches)

    def draw(self, wanted: SamplingOptions, progress: bool | None = None, on_step: OnStep | None = None) -> Tensor:
        """Make images, all of them: [N, C, H, W] float32 on the CPU; see `batches`."""
        return torch.cat([x for _, x in self.batches(wanted, progress, on_step)])

    def batches(
        self,
        wanted: SamplingOptions,
        progress: bool | None = None,
        on_step: OnStep | None = None,
        done: Container[int] = (),
    ) -> Iterator[tuple[int, Tensor]]:
        """Make images, batch by batch: yield each batch's first number, and it as [N, C, H, W] float32 on the CPU.

        Args:
            wanted: which images.
            progress: show a bar, or say a line now and then; None for neither.
            on_step: called after each step with its number and x; see `SamplingLoop.run`.
            done: numbers of images that are there: a batch of nothing else is not made.
        """
        set_tf32(self.options.precision)  # a setting of the process, which another model may have changed
        with enough_memory(self.device, wanted.batch_size), self._choosing:
            labels, loop = self.labels_for(wanted), self._loop_for(wanted)
        asked = {"labels": labels, "guidance": wanted.guidance}
        images = ImageRange(wanted.seed, wanted.first_index, wanted.count, done, **asked)
        return self._stream(loop, images, wanted.batch_size, progress, on_step)

    def _stream(
        self, loop: SamplingLoop, images: ImageRange, largest: int, progress: bool | None, on_step: OnStep | None
    ) -> Iterator[tuple[int, Tensor]]:
        with enough_memory(self.device, largest):
            for batch in stream_images(loop, images, largest, progress, on_step):
                yield batch
                set_tf32(self.options.precision)  # who took the batch may have used another model

    def labels_for(self, wanted: SamplingOptions) -> tuple[int, ...]:
        """Return the labels of images 0, 1, ..., over and over; what guides the model is loaded with that.

        Raises:
            InputError: the model knows no such label, nothing guides it, or what is to guide it does not fit.
        """
        labels = labels_asked(wanted, self.config, self.path)
        if wanted.guide != self._guide_name:
            guide = Model(Path(wanted.guide), self.options) if wanted.guide else None
            if guide is not None:
                require_fitting(guide.config, self.config, wanted.guide)
            self.guide, self._guide_name = guide, wanted.guide
        return labels

    def _loop_for(self, wanted: SamplingOptions) -> SamplingLoop:
        """Return the last loop where it fits, with the U-Net's weights of now, else a new one."""
        sampler = wanted.sampler_for(self.config)
        table = sampler_table(self.config.diffusion, sampler)
        flop = float(self.unet.estimate_flop()) * len(table.rows) * wanted.count
        execution = choose_execution(self.options.compile, self.options.capture, self.device, flop)
        with self._choosing:
            guide = None if wanted.guidance == 1 else (self.guide or self).unet
            wish = (sampler, execution, guide)
            if self.loop is not None and wish == self._wish:
                self.loop.load_weights(self.unet, guide)
                return self.loop
            self.loop, self._wish = None, wish  # free the old one first
            dtype = choose_dtype(self.options.precision, self.device)
            self.loop = SamplingLoop(self.unet, table, dtype, execution, guide=guide)
            return self.loop


def unet_of(found: checkpoint.Checkpoint, part: str) -> UNet:
    """Build a checkpoint's U-Net on the CPU with one of its parts' weights.

    Raises:
        InputError: they cannot be read, or do not fit.
    """
    with torch.device("meta"):
        unet = UNet(found.config.unet)
    try:
        unet.load_state_dict(found.tensors(part), assign=True)
    except RuntimeError as error:
        raise InputError(f"{found.path} does not fit its own configuration: {str(error).splitlines()[-1]}") from None
    return unet
