"""The engine's ops at the U-Net's shapes, each with the least bytes it must move.

One call of an op's work runs the op on several sets of inputs, together larger than the device's cache: over and over
on one set, it is the cache that would be measured. Shapes: N images, C channels, H x W pixels, K steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.timing.clock import Clock
from ddpm_fast import ops
from ddpm_fast.checks import kernels as check_kernels
from ddpm_fast.config import Config
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.diffusion.schedule import training_table

MOST_SETS = 32
"""Sets of inputs of one op at most: small shapes fit in any cache, in the engine's loop as well."""

Op = Callable[..., Any]


@dataclass(frozen=True)
class OpWork:
    """An op at one shape."""

    name: str
    shape: str
    sets: tuple[Callable[[Op], object], ...]
    """Each calls a given form of the op on inputs of its own."""
    op: Op
    moved: int
    """Least bytes of one call: each input read once, each output written once."""
    operations: int
    """Arithmetic of one call, about, for its place in the roofline."""
    count: int = 1
    """How often one step of the U-Net runs this."""

    def work(self, op: Op) -> Callable[[], object]:
        """Return what is timed: `op`, a form of this op, once on each set."""

        def run() -> None:
            for inputs in self.sets:
                inputs(op)

        return run


def forms(op: Op, kernels: bool, compiled: bool) -> dict[str, Op]:
    """Return the op in plain PyTorch, and as asked what torch.compile makes of that and the Triton kernel."""
    reference = partial(op, kernels=False)
    found: dict[str, Op] = {"reference": reference}
    if compiled:
        found["compiled reference"] = torch.compile(reference, dynamic=False)
    if kernels:
        found["kernel"] = partial(op, kernels=True)
    return found


# Arithmetic an element, counted by hand: a normal takes about 25 integer operations of Philox and 15 of Box-Muller.
OPERATIONS = {"q_sample": 45, "noise_mse": 50, "group_norm_silu": 12, "timestep_embedding": 20, "reverse_step": 50}


def _repeated(make: Callable[[], Callable[[Op], object]], moved: int, clock: Clock) -> tuple[Any, ...]:
    return tuple(make() for _ in range(min(MOST_SETS, 1 + 2 * clock.cache_bytes() // max(moved, 1))))


def _images(config: Config, n: int, device: torch.device) -> Tensor:
    """Return random images [N, C, H, W] uint8, laid out as NHWC as the trainer's batches are."""
    unet = config.unet
    images = torch.randint(0, 256, (n, unet.height, unet.width, unet.image_channels), dtype=torch.uint8, device=device)
    return images.permute(0, 3, 1, 2)


def _training_arguments(config: Config, n: int, device: torch.device) -> tuple[Tensor, ...]:
    t = torch.randint(0, config.diffusion.timesteps, (n,), device=device)
    return t, training_table(config.diffusion).to(device), key_from_seed(0, device), torch.arange(n, device=device)


def q_sample(config: Config, n: int, dtype: torch.dtype, clock: Clock) -> OpWork:
    """Diffuse a batch: reads uint8 images, writes x_t."""
    elements = _images(config, n, clock.device).numel()
    moved = elements * (1 + dtype.itemsize)

    def make() -> Callable[[Op], object]:
        images, arguments = _images(config, n, clock.device), _training_arguments(config, n, clock.device)
        return lambda op: op(images, *arguments, flip=config.data.flip, dtype=dtype, channels_last=True)

    sets = _repeated(make, moved, clock)
    return OpWork("q_sample", f"{n} images", sets, ops.q_sample, moved, elements * OPERATIONS["q_sample"])


def noise_mse(config: Config, n: int, dtype: torch.dtype, clock: Clock, backward: bool) -> OpWork:
    """Compare a prediction with its noise; backward makes the noise again and writes the gradient."""
    elements = _images(config, n, clock.device).numel()
    read = elements * (1 + dtype.itemsize)
    moved = 2 * read + elements * dtype.itemsize if backward else read

    def make() -> Callable[[Op], object]:
        images, arguments = _images(config, n, clock.device), _training_arguments(config, n, clock.device)
        prediction = torch.randn(images.shape, device=clock.device).to(dtype, memory_format=torch.channels_last)
        prediction.requires_grad_(backward)

        def call(op: Op) -> object:
            with torch.set_grad_enabled(backward):
                losses = op(prediction, images, *arguments, flip=config.data.flip)
                return torch.autograd.grad(losses.sum(), prediction) if backward else losses

        return call

    sets = _repeated(make, moved, clock)
    operations = elements * OPERATIONS["noise_mse"] * (2 if backward else 1)
    name = "noise_mse, forward and backward" if backward else "noise_mse"
    return OpWork(name, f"{n} images", sets, ops.noise_mse, moved, operations)


def group_norm_silu(norm: check_kernels.Norm, n: int, dtype: torch.dtype, clock: Clock, backward: bool) -> OpWork:
    """Normalise one feature map: reads and writes it once; backward reads it and dy, and writes dx."""
    shape = (n, norm.channels, norm.height, norm.width)
    elements = n * norm.channels * norm.height * norm.width
    moved = elements * dtype.itemsize * (5 if backward else 2)

    def make() -> Callable[[Op], object]:
        x, dy = (torch.randn(shape, device=clock.device).to(dtype, memory_format=torch.channels_last) for _ in range(2))
        weight, bias = (torch.randn(norm.channels, device=clock.device, requires_grad=backward) for _ in range(2))
        shift = torch.randn(n, norm.channels, device=clock.device).to(dtype) if norm.shift else None
        x.requires_grad_(backward)

        def call(op: Op) -> object:
            with torch.set_grad_enabled(backward):  # without gradients it is what sampling runs
                y = op(x, weight, bias, norm.groups, shift=shift, silu=norm.silu)
                return torch.autograd.grad(y, (x, weight, bias), dy) if backward else y

        return call

    name = "group_norm_silu" if norm.silu else "group_norm"
    name += ", forward and backward" if backward else ""
    operations = elements * OPERATIONS["group_norm_silu"] * (3 if backward else 1)
    text = f"{n}x{norm.channels}x{norm.height}x{norm.width}" + (" with shift" if norm.shift else "")
    return OpWork(name, text, _repeated(make, moved, clock), ops.group_norm_silu, moved, operations)


def timestep_embedding(config: Config, n: int, clock: Clock) -> OpWork:
    """Embed the timesteps of a batch: writes N x channels float32."""
    channels = config.unet.channels
    moved = n * (8 + 4 * channels)

    def make() -> Callable[[Op], object]:
        t = torch.randint(0, config.diffusion.timesteps, (n,), device=clock.device)
        return lambda op: op(t, channels)

    sets, operations = _repeated(make, moved, clock), n * channels * OPERATIONS["timestep_embedding"]
    return OpWork("timestep_embedding", f"{n}x{channels}", sets, ops.timestep_embedding, moved, operations)


def reverse_step(config: Config, n: int, dtype: torch.dtype, clock: Clock) -> OpWork:
    """Take one row of the paper's sampler: reads x and the prediction, writes x and the U-Net's next input."""
    unet, table = config.unet, sampler_table(config.diffusion)
    elements = n * unet.image_channels * unet.height * unet.width
    moved = elements * (8 + 2 * dtype.itemsize)
    rows, step = table.rows.to(clock.device, torch.float32), torch.zeros(1, dtype=torch.int64, device=clock.device)
    key, numbers = key_from_seed(0, clock.device), torch.arange(n, device=clock.device)

    def make() -> Callable[[Op], object]:
        shape = (n, unet.image_channels, unet.height, unet.width)
        x = torch.randn(shape, device=clock.device).to(memory_format=torch.channels_last)
        out, model_input = x.to(dtype, copy=True), x.to(dtype, copy=True)
        return lambda op: op(
            x, out, rows, step, key, numbers, clip=table.clip, noisy=table.noisy, model_input=model_input
        )

    sets, operations = _repeated(make, moved, clock), elements * OPERATIONS["reverse_step"]
    return OpWork("reverse_step", f"{n} images", sets, ops.reverse_step, moved, operations)


def builders(
    config: Config, n: int, dtype: torch.dtype, clock: Clock, norms: int | None = None
) -> dict[str, Callable[[], OpWork]]:
    """Return every op at the shapes that one step on n images has; nothing is allocated until one is built.

    The norms come first, those that move the most bytes in a step before the others.

    Args:
        norms: only so many of the GroupNorms, those that move the most; None is all.
    """
    found: dict[str, Callable[[], OpWork]] = {}
    counted = check_kernels.norms(config.unet)
    by_bytes = sorted(counted, key=lambda norm: -counted[norm] * norm.channels * norm.height * norm.width)
    for norm in by_bytes[:norms]:
        name = f"group_norm-{norm.channels}x{norm.height}x{norm.width}"
        name += ("-shift" if norm.shift else "") + ("-silu" if norm.silu else "")
        for suffix, backward in (("", False), ("-backward", True)):
            found[name + suffix] = partial(_counted_norm, counted[norm], norm, n, dtype, clock, backward)
    return found | {
        "q_sample": partial(q_sample, config, n, dtype, clock),
        "noise_mse": partial(noise_mse, config, n, dtype, clock, False),
        "noise_mse-backward": partial(noise_mse, config, n, dtype, clock, True),
        "timestep_embedding": partial(timestep_embedding, config, n, clock),
        "reverse_step": partial(reverse_step, config, n, dtype, clock),
    }


def _counted_norm(
    count: int, norm: check_kernels.Norm, n: int, dtype: torch.dtype, clock: Clock, backward: bool
) -> OpWork:
    return replace(group_norm_silu(norm, n, dtype, clock, backward), count=count)
