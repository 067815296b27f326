"""Is each kernel right at this U-Net's own shapes on this device?

A kernel is held to plain PyTorch in float64: error <= 2 * error of plain PyTorch in the same dtype + (eps(dtype) +
SLACK * eps(float32)) * scale. The scale is the result's largest magnitude; of a sum whose terms cancel, the sum of
their magnitudes.
Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.checks.norms import Norm, norms
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.checks.stand_in import steps_to_check
from ddpm_fast.config import Config
from ddpm_fast.constants import StepFigures, StepNumbers
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed, random_timesteps
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import REFERENCE, Ops
from ddpm_fast.ops.reference import Dropout

SLACK = 8
"""Roundings that the tests do not allow: here a false alarm would stop a user's run, and a fault costs thousands."""
QUICK_IMAGES = 2
_BACKWARD = "kernels/group_norm_silu_backward.py or kernels/group_norm_silu.py"
FILES = {
    "group_norm_silu backward": _BACKWARD,
    "group_norm_silu_and_residual forward": "kernels/group_norm_silu.py",
    "group_norm_silu_and_residual backward": _BACKWARD,
}
"""To look at for an op and direction, where it is not the one file of the op's name."""
MOST_ELEMENTS = 2**26
"""Of the largest feature map in full, and of the weights: float64 and its gradients take some 50 bytes each."""

Op = Callable[..., Any]
Inputs = dict[str, Tensor]


class Case(NamedTuple):
    """One op at one shape."""

    op: str
    direction: str
    """Empty, or "forward" or "backward" of an op that has both; the latter runs the former, too."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Inputs]
    """Make random inputs: the same numbers each time, in new memory."""
    run: Callable[[Op, Inputs], Sequence[Tensor]]
    """Run a form of the op, and return the results that count."""
    scales: Callable[[Sequence[Tensor]], list[float]]
    norm: Norm | None = None


def _largest(results: Sequence[Tensor]) -> list[float]:
    return [float(result.abs().max()) for result in results]


def _largest_with_shift(results: Sequence[Tensor]) -> list[float]:
    """Return the scales of dx, dweight, dbias and dshift, which is a sum of dx over pixels that nearly cancels."""
    scales = _largest(results)
    scales[3] = float(results[0].abs().sum((2, 3)).max())
    return scales


def _in_compute_dtype(dtype: torch.dtype, input: Tensor) -> torch.dtype:
    """Return float64 if that is what an input was promoted to, else the case's own dtype."""
    return torch.float64 if input.dtype == torch.float64 else dtype


def _normal(shape: Sequence[int], device: torch.device, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def _maps(shape: Sequence[int], device: torch.device, seed: int) -> Tensor:
    return _normal(shape, device, seed).contiguous(memory_format=torch.channels_last)


def _address(config: Config, images: int, device: torch.device) -> Inputs:
    return {"key": key_from_seed(config.training.seed, device), "sample_index": torch.arange(images, device=device)}


def _training_cases(config: Config, images: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield q_sample and noise_mse."""
    shape, flip = (images, config.unet.image_channels, config.unet.height, config.unet.width), config.data.flip

    def examples() -> Inputs:
        address = _address(config, images, device)
        return {
            "images": (127.5 + 80 * _maps(shape, device, 0)).clamp(0, 255).to(torch.uint8),
            "t": random_timesteps(NoiseAddress(**address), config.diffusion.timesteps),
            "table": training_table(config.diffusion, config.training.min_snr_gamma).to(device),
            **address,
        }

    def predicted() -> Inputs:
        return {"prediction": _maps(shape, device, 1).to(dtype), **examples()}

    def diffuse(op: Op, inputs: Inputs) -> Sequence[Tensor]:
        return [op(**inputs, flip=flip, dtype=_in_compute_dtype(dtype, inputs["table"]))]

    def compare(op: Op, inputs: Inputs) -> Sequence[Tensor]:
        return [op(**inputs, flip=flip)]

    def differentiate(op: Op, inputs: Inputs) -> Sequence[Tensor]:
        prediction = inputs["prediction"].requires_grad_()
        return torch.autograd.grad(op(**inputs, flip=flip).mean(), prediction)

    yield Case("q_sample", "", shape, dtype, examples, diffuse, _largest)
    yield Case("noise_mse", "forward", shape, dtype, predicted, compare, _largest)
    yield Case("noise_mse", "backward", shape, dtype, predicted, differentiate, _largest)


def _sampling_cases(config: Config, images: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield timestep_embedding and reverse_step."""
    unet, steps = config.unet, config.diffusion.timesteps
    shape = (images, unet.image_channels, unet.height, unet.width)
    table = sampler_table(config.diffusion)

    def all_steps() -> Inputs:
        return {"t": torch.arange(steps, device=device).float()}

    def embed(op: Op, inputs: Inputs) -> Sequence[Tensor]:
        return [op(inputs["t"], unet.channels, _in_compute_dtype(torch.float32, inputs["t"]))]

    def step_inputs() -> Inputs:
        copied = {} if dtype == torch.float32 else {"model_input": _maps(shape, device, 2).to(dtype)}
        return {
            "x": _maps(shape, device, 0),
            "prediction": _maps(shape, device, 1).to(dtype),
            "rows": table.rows.to(device, torch.float32),
            "step": torch.ones(1, dtype=torch.int64, device=device),
            **_address(config, images, device),
            **copied,
        }

    def step(op: Op, inputs: Inputs) -> Sequence[Tensor]:
        op(**inputs, clip=table.clip, noisy=table.noisy)
        return [inputs[name] for name in ("x", "model_input") if name in inputs]

    yield Case("timestep_embedding", "", (steps, unet.channels), torch.float32, all_steps, embed, _largest)
    yield Case("reverse_step", "", shape, dtype, step_inputs, step, _largest)


def _update_cases(config: Config, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield adam_ema, of as many numbers as the U-Net has: numbers and steps of about 1, where every fault is seen."""
    training = config.training
    with torch.device("meta"):
        size = min(MOST_ELEMENTS, sum(parameter.numel() for parameter in UNet(config.unet).parameters()))
    moved = ("weights", "exp_avg", "exp_avg_sq", "ema")

    def step_inputs() -> Inputs:
        copied = {} if dtype == torch.float32 else {"low_precision": torch.zeros(size, dtype=dtype, device=device)}
        numbers = StepNumbers(step=steps_to_check(training)[-1], updates=5, bad_step=-1, loss_steps=0)
        return {
            **{name: _normal((size,), device, seed) for seed, name in enumerate(moved)},
            "exp_avg_sq": _normal((size,), device, 4).square(),
            "gradient": _normal((size,), device, 5),
            "loss": torch.ones((), device=device),
            "numbers": torch.tensor(numbers, device=device),
            "figures": torch.zeros(len(StepFigures._fields), device=device),
            **copied,
        }

    def update(op: Op, inputs: Inputs) -> Sequence[Tensor]:
        op(
            **{"low_precision": None, **inputs},
            learning_rate=1.0,
            warmup_steps=training.warmup_steps,
            steps=training.steps,
            cooldown_steps=training.cooldown_steps,
            beta2=training.adam_beta2,
            clip_norm=size**0.5 / 2,
            ema_decay=training.ema_decay,
        )
        return [inputs[name] for name in (*moved, "figures", "low_precision") if name in inputs]

    yield Case("adam_ema", "", (size,), dtype, step_inputs, update, _largest)


def _norm_cases(norm: Norm, images: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield group_norm_silu, or its form for residual branches, forward and backward."""
    shape, channels = (images, norm.channels, norm.height, norm.width), norm.channels
    first = (images, channels - norm.beside, norm.height, norm.width)
    options: dict[str, Any] = {"groups": norm.groups, "silu": norm.silu}
    if norm.dropout:
        index = torch.arange(images, device=device)
        options["dropout"] = Dropout(norm.dropout, key_from_seed(0, device), index, 1)
    gradients = ("dy", "other") if norm.residual else ("dy",)

    def forward_inputs() -> Inputs:
        parameters = {
            "weight": 1 + 0.1 * _normal((channels,), device, 1),
            "bias": 0.1 * _normal((channels,), device, 2),
        }
        more = {}
        if norm.shift:
            more["shift"] = _normal(first[:2], device, 3)
        if norm.added:
            more["added"] = _maps(first, device, 6)
        if norm.beside:
            more["beside"] = _maps((images, norm.beside, norm.height, norm.width), device, 7)
        more = {name: value.to(dtype) for name, value in more.items()}
        return {"x": _maps(first, device, 0).to(dtype), **parameters, **more}

    def backward_inputs() -> Inputs:
        random = {name: _maps(shape, device, 4 + place).to(dtype) for place, name in enumerate(gradients)}
        return {**forward_inputs(), **random}

    def normalize(op: Op, inputs: Inputs) -> Sequence[Tensor]:
        found = op(**inputs, **options)
        return found if norm.residual else [found]

    def differentiate(op: Op, inputs: Inputs) -> Sequence[Tensor]:
        given = {name: value.requires_grad_() for name, value in inputs.items() if name not in gradients}
        found = normalize(op, given)
        towards = [inputs[name].to(found[0].dtype) for name in gradients]
        return torch.autograd.grad(found, list(given.values()), towards)

    name = "group_norm_silu_and_residual" if norm.residual else "group_norm_silu"
    case = partial(Case, name, norm=norm, shape=shape, dtype=dtype)
    yield case("forward", make=forward_inputs, run=normalize, scales=_largest)
    if not (norm.added or (norm.residual and norm.shift)):  # which are in sampling alone
        scales = _largest_with_shift if norm.shift else _largest
        yield case("backward", make=backward_inputs, run=differentiate, scales=scales)


def cases(config: Config, images: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield every op at every shape at which this configuration's U-Net uses it."""
    yield from _training_cases(config, images, device, dtype)
    yield from _sampling_cases(config, images, device, dtype)
    yield from _update_cases(config, device, dtype)
    for norm in norms(config.unet) | norms(config.unet, sampling=True):
        yield from _norm_cases(norm, images, device, dtype)


def error_and_bound(case: Case, ops: Ops) -> tuple[float, float]:
    """Return the op's largest error, and what is allowed, both relative to the scale of the result."""
    plain_op = getattr(REFERENCE, case.op)
    precise = {name: value.double() if value.is_floating_point() else value for name, value in case.make().items()}
    found, plain = case.run(getattr(ops, case.op), case.make()), case.run(plain_op, case.make())
    truth, worst = case.run(plain_op, precise), (0.0, 1.0)
    for ours, theirs, exact, scale in zip(found, plain, truth, case.scales(truth), strict=True):
        error, usual = (float((value.double() - exact).abs().max()) / scale for value in (ours, theirs))
        bound = 2 * usual + torch.finfo(ours.dtype).eps + SLACK * torch.finfo(torch.float32).eps
        if not error / bound <= worst[0] / worst[1]:  # NaN is worse than anything
            worst = (error, bound)
    return worst


def worst_cases(
    ops: Ops, config: Config, images: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[float, float, str]]:
    """Return by op and direction the error and the bound that it comes closest to, and the shape."""
    worst: dict[str, tuple[float, float, str]] = {}
    for case in cases(config, images, device, dtype):
        name, (error, bound) = f"{case.op} {case.direction}".rstrip(), error_and_bound(case, ops)
        if name not in worst or not error / bound <= worst[name][0] / worst[name][1]:
            worst[name] = error, bound, "x".join(map(str, case.shape))
    return worst


def check_kernels(ops: Ops, config: Config, device: torch.device, dtype: torch.dtype) -> Iterator[CheckResult]:
    """Check every kernel at this U-Net's shapes on a few images, one line per op and direction."""
    for name, (error, bound, shape) in worst_cases(ops, config, QUICK_IMAGES, device, dtype).items():
        line, file = f"the {name} kernel equals plain PyTorch", FILES.get(name, f"kernels/{name.split()[0]}.py")
        yield CheckResult("kernels", line, judged(error <= bound), f"<= {bound:.1e}", f"{error:.1e} at {shape}", file)


def kernel_table(ops: Ops, config: Config, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, bool]]:
    """Yield the same at training's batch size as the rows of a table, each with whether it is right."""
    largest = max(norm.channels * norm.height * norm.width for norm in norms(config.unet))
    images = max(1, min(config.training.batch_size, MOST_ELEMENTS // largest))
    yield f"{'kernel':<38} {'worst at':<18} {'error':>8} {'bound':>8}", True
    for name, (error, bound, shape) in worst_cases(ops, config, images, device, dtype).items():
        yield f"{name:<38} {shape:<18} {error:8.1e} {bound:8.1e}", error <= bound
