"""Is each kernel right at this U-Net's own shapes on this device, and is it worth its place there?

A kernel is held to its reference in float64: error <= 2 * error of plain PyTorch in the same dtype + (eps(dtype) +
SLACK * eps(float32)) * scale. The scale is the result's largest magnitude; of a sum whose terms cancel, the sum of
their magnitudes.
Times are medians of `triton.testing.do_bench`, which empties the L2 cache between runs; bytes are those that must move,
each input read once and each output written once.
Shapes: N images, C channels, H x W pixels.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as autograd_compiler

from ddpm_fast import ops
from ddpm_fast.checks.process import Line
from ddpm_fast.config import Config, UNetConfig
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed, timesteps
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.model.blocks import GroupNormSiLU
from ddpm_fast.model.unet import UNet

SLACK = 8
"""Roundings that the tests do not allow: here a false alarm would stop a user's run, and a fault costs thousands."""
QUICK_IMAGES = 2
MOST_ELEMENTS = 2**26
"""Of the largest feature map in full: float64 and its gradients take some 50 bytes each."""

Op = Callable[..., Any]
Run = Callable[[], Sequence[Tensor]]


class Case(NamedTuple):
    """One op at one shape."""

    op: str
    direction: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    read: tuple[str, ...]
    """Names of the inputs that the op must read."""
    prepare: Callable[[Op, dict[str, Tensor]], Run]
    """Bind the op to its inputs; what it returns is compared and timed."""
    scales: Callable[[Sequence[Tensor]], list[float]]


class Norm(NamedTuple):
    """A GroupNorm of a U-Net as it is called."""

    channels: int
    height: int
    width: int
    groups: int
    silu: bool
    shift: bool
    dropout: float


def norms(config: UNetConfig) -> Counter[Norm]:
    """Count the different GroupNorms of a U-Net in training, in forward order, by running it without data."""
    found: Counter[Norm] = Counter()

    def look(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, GroupNormSiLU)
        x, *rest = arguments
        shift, dropout = (*rest, None, None)[:2]
        _, channels, height, width = x.shape
        probability = 0.0 if dropout is None else dropout.probability
        found[Norm(channels, height, width, module.groups, module.silu, shift is not None, probability)] += 1

    with torch.device("meta"):
        unet = UNet(config).use_kernels(False)
        for module in unet.modules():
            if isinstance(module, GroupNormSiLU):
                module.register_forward_pre_hook(look)
        one = torch.zeros(1, dtype=torch.int64)
        x = torch.zeros(1, config.image_channels, config.height, config.width)
        unet(x, one, NoiseAddress(torch.zeros(2, dtype=torch.int64), one))
    return found


def _largest(results: Sequence[Tensor]) -> list[float]:
    return [float(result.abs().max()) for result in results]


def _largest_with_shift(results: Sequence[Tensor]) -> list[float]:
    """Return the scales of dx, dweight, dbias and dshift, which is a sum of dx over pixels that nearly cancels."""
    scales = _largest(results)
    if len(results) > 3:
        scales[3] = float(results[0].abs().sum((2, 3)).max())
    return scales


def _in_compute_dtype(dtype: torch.dtype, inputs: dict[str, Tensor], name: str) -> torch.dtype:
    """Return float64 if that is what an input was promoted to, else the case's own dtype."""
    return torch.float64 if inputs[name].dtype == torch.float64 else dtype


def _image_cases(config: Config, images: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the ops that work on images: q_sample, noise_mse, reverse_step, and timestep_embedding."""
    unet, flip = config.unet, config.data.flip
    shape = (images, unet.image_channels, unet.height, unet.width)
    sample_index = torch.arange(images, device=device)
    key = key_from_seed(config.training.seed, device)
    t = timesteps(NoiseAddress(key, sample_index), config.diffusion.timesteps)
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        value = torch.randn(shape, generator=generator)
        return value.to(device).contiguous(memory_format=torch.channels_last)

    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    address = {
        "images": pixels.contiguous(memory_format=torch.channels_last),
        "t": t,
        "table": training_table(config.diffusion, config.training.min_snr_gamma).to(device),
        "key": key,
        "sample_index": sample_index,
    }

    def diffuse(op: Op, inputs: dict[str, Tensor]) -> Run:
        result = _in_compute_dtype(dtype, inputs, "table")
        return lambda: [op(**inputs, flip=flip, dtype=result, channels_last=True)]

    def compare(op: Op, inputs: dict[str, Tensor]) -> Run:
        return lambda: [op(**inputs, flip=flip)]

    def differentiate(op: Op, inputs: dict[str, Tensor]) -> Run:
        prediction = inputs["prediction"].requires_grad_()
        loss = op(**inputs, flip=flip).mean()
        return lambda: torch.autograd.grad(loss, prediction, retain_graph=True)

    yield Case("q_sample", "", shape, dtype, address, ("images",), diffuse, _largest)
    compared = {"prediction": noise().to(dtype), **address}
    read = ("prediction", "images")
    yield Case("noise_mse", "forward", shape, dtype, compared, read, compare, _largest)
    yield Case("noise_mse", "backward", shape, dtype, compared, read, differentiate, _largest)

    table = sampler_table(config.diffusion)
    rows = {"rows": table.rows.to(device, torch.float32), "step": torch.ones(1, dtype=torch.int64, device=device)}
    stepped = {"x": noise(), "out": noise().to(dtype), **rows, "key": key, "sample_index": sample_index}
    copied = {} if dtype == torch.float32 else {"model_input": noise().to(dtype)}

    def step(op: Op, inputs: dict[str, Tensor]) -> Run:
        def run() -> Sequence[Tensor]:
            op(**inputs, clip=table.clip, noisy=table.noisy)
            return [inputs[name] for name in ("x", "model_input") if name in inputs]

        return run

    yield Case("reverse_step", "", shape, dtype, {**stepped, **copied}, ("x", "out"), step, _largest)

    def embed(op: Op, inputs: dict[str, Tensor]) -> Run:
        result = _in_compute_dtype(torch.float32, inputs, "t")
        return lambda: [op(inputs["t"], unet.channels, result)]

    whole = {"t": torch.arange(config.diffusion.timesteps, device=device).float()}
    size = (config.diffusion.timesteps, unet.channels)
    yield Case("timestep_embedding", "", size, torch.float32, whole, ("t",), embed, _largest)


def _norm_case(norm: Norm, direction: str, images: int, device: torch.device, dtype: torch.dtype, seed: int) -> Case:
    shape, channels = (images, norm.channels, norm.height, norm.width), norm.channels
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    def maps() -> Tensor:
        return normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

    inputs = {"x": maps(), "weight": 1 + 0.1 * normal(channels), "bias": 0.1 * normal(channels)}
    if norm.shift:
        inputs["shift"] = normal(images, channels).to(dtype)
    dropout = None
    if norm.dropout:
        dropout = ops.Dropout(norm.dropout, key_from_seed(seed, device), torch.arange(images, device=device), 1)
    options = {"groups": norm.groups, "silu": norm.silu, "dropout": dropout}
    if direction == "forward":
        return Case(
            "group_norm_silu", direction, shape, dtype, inputs, ("x",),
            lambda op, given: lambda: [op(**given, **options)], _largest,
        )  # fmt: skip

    def differentiate(op: Op, given: dict[str, Tensor]) -> Run:
        leaves = [given[name].requires_grad_() for name in inputs]
        y = op(**{name: given[name] for name in inputs}, **options)
        return lambda: torch.autograd.grad(y, leaves, given["dy"].to(y.dtype), retain_graph=True)

    return Case(
        "group_norm_silu", direction, shape, dtype, {**inputs, "dy": maps()}, ("x", "dy"),
        differentiate, _largest_with_shift,
    )  # fmt: skip


def cases(config: Config, images: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield every op at every shape at which this configuration's U-Net uses it, on random inputs."""
    yield from _image_cases(config, images, device, dtype)
    for seed, norm in enumerate(norms(config.unet)):
        for direction in ("forward", "backward"):
            yield _norm_case(norm, direction, images, device, dtype, seed)


def _bind(case: Case, kernels: bool, precise: bool = False, compiled: bool = False) -> Run:
    """Return the case on inputs of its own, by the kernel or plain PyTorch; precise: in float64."""
    op: Op = partial(getattr(ops, case.op), kernels=kernels)
    own = {k: v.double() if precise and v.is_floating_point() else v.clone() for k, v in case.inputs.items()}
    if compiled:
        torch._dynamo.reset()  # else all cases count as recompilations of one function, and soon none is compiled
        op = torch.compile(op, dynamic=False, fullgraph=True)
    # A backward pass that is repeated keeps its tensors: it must not be compiled, or found in the cache, to reuse them.
    with autograd_compiler.patch(donated_buffer=False):
        return case.prepare(op, own)


def error_and_bound(case: Case) -> tuple[float, float]:
    """Return the kernel's largest error, and what is allowed, both relative to the scale of the result."""
    found, plain, truth = _bind(case, True)(), _bind(case, False)(), _bind(case, False, precise=True)()
    worst = (0.0, 1.0)
    for ours, theirs, exact, scale in zip(found, plain, truth, case.scales(truth), strict=True):
        error, usual = (float((value.double() - exact).abs().max()) / scale for value in (ours, theirs))
        bound = 2 * usual + torch.finfo(ours.dtype).eps + SLACK * torch.finfo(torch.float32).eps
        if not error / bound <= worst[0] / worst[1]:  # NaN is worse than anything
            worst = (error, bound)
    return worst


def check_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> Iterator[Line]:
    """Check every kernel at this U-Net's shapes, a line an op with the shape that comes closest to its bound."""
    worst: dict[str, tuple[float, float, Case]] = {}
    for case in cases(config, QUICK_IMAGES, device, dtype):
        error, bound = error_and_bound(case)
        before = worst.get(case.op)
        if before is None or not error / bound <= before[0] / before[1]:
            worst[case.op] = (error, bound, case)
    for op, (error, bound, case) in worst.items():
        at = f"{'x'.join(map(str, case.shape))} {case.direction}".strip()
        name = f"the {op} kernel equals plain PyTorch"
        yield Line(name, error <= bound, f"below {bound:.1e}", f"{error:.1e} at {at}", f"kernels/{op}.py")


HEADER = (
    f"{'op':<25} {'shape':<18} {'dtype':<9} {'error':>8} {'bound':>8} "
    f"{'us':>8} {'GB/s':>6} {'of copy':>7} {'x eager':>8} {'x compiled':>10}"
)


def _milliseconds(run: Run) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))  # pyright: ignore[reportArgumentType]


def copy_gb_per_s(device: torch.device) -> float:
    """Measure the device's copy bandwidth, bytes read plus bytes written, over 1 GiB."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _milliseconds(lambda: [target.copy_(source)]) / 1e6


def _times(case: Case, copy: float) -> str:
    """Return the table's columns of a case's times, against the device's copy bandwidth in GB/s."""
    kernel = _bind(case, True)
    written = sum(result.nbytes for result in kernel())
    gigabytes = (written + sum(case.inputs[name].nbytes for name in case.read)) / 1e9
    took = _milliseconds(kernel)
    eager, compiled = (_milliseconds(_bind(case, False, compiled=how)) / took for how in (False, True))
    rate = gigabytes / took * 1e3
    return f"{took * 1e3:8.1f} {rate:6.0f} {rate / copy:7.0%} {eager:8.2f} {compiled:10.2f}"


def kernel_table(config: Config, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, bool]]:
    """Yield the table of every kernel at this U-Net's shapes, row by row, and whether each row is within its bound.

    Errors everywhere; times on a GPU alone.
    """
    largest = max(norm.channels * norm.height * norm.width for norm in norms(config.unet))
    images = max(1, min(config.training.batch_size, MOST_ELEMENTS // largest))
    timed = device.type == "cuda"
    copy = copy_gb_per_s(device) if timed else 0.0
    yield f"kernels at {images} images" + (f"; copying runs at {copy:.0f} GB/s" if timed else ""), True
    yield HEADER if timed else HEADER[: HEADER.index("bound") + 5], True
    for case in cases(config, images, device, dtype):
        error, bound = error_and_bound(case)
        columns = (
            f"{case.op} {case.direction}",
            "x".join(map(str, case.shape)),
            str(case.dtype).removeprefix("torch."),
        )
        row = "{:<25} {:<18} {:<9}".format(*columns) + f" {error:8.1e} {bound:8.1e}"
        yield row + (f" {_times(case, copy)}" if timed else ""), error <= bound
