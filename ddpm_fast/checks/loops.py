"""Does a sampling loop do what its table says, with the network that was trained?

A loop's steps are recorded as it really takes them, and each is computed again from its recorded inputs: the row, the
network's output for that row's timestep, x0, the next x, the noise. So the first fault is named, and not carried on.
Shapes: N images, K steps, S the U-Net's time shifts.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.checks.labels import asked_of, predicted
from ddpm_fast.checks.results import CheckResult, Verdict, judged
from ddpm_fast.checks.tables import Given, name_of, next_of, rows_of, x0_of
from ddpm_fast.config import DiffusionConfig, SamplerConfig
from ddpm_fast.constants import SAMPLER_COLUMN
from ddpm_fast.diffusion import samplers
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.engine import sampling
from ddpm_fast.errors import MathematicsError
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import REFERENCE

BATCH = 2
IMAGES = sampling.ImageRange(seed=2**32 + 5, first=17, count=3)
"""Drawn in two batches, of which the second is padded."""
ROUNDING = 32 * torch.finfo(torch.float32).eps
"""Of a step, relative to the sizes of its terms."""
OUTPUTS = {torch.float32: 5e-3, torch.bfloat16: 0.1}
"""Relative difference of a perturbed network's outputs that is still rounding, in TF32 and in bfloat16 (measured: 0.03
for cifar10), where layers may take other forms in sampling; a wrong t or dropout makes half of their size."""
EXACT = 1e-4
"""The same without TF32 (measured: 3e-6)."""
ROUNDINGS, MOST_ROUNDING = 16, 1e-2
"""How many times its own rounding a network may be off, which computes in another order; and what is none any more."""
LARGE = 1e12
"""Beyond this, squares come near the end of float32."""
LOOP, NETWORK = "ddpm_fast/engine/sampling.py", "ddpm_fast/model/unet.py or ddpm_fast/engine/sampling.py"


@dataclass(frozen=True)
class Step:
    """What one step of a loop was given, and made of it."""

    model_input: Tensor  # [N, C, H, W], as all below but where said
    shifts: Tensor  # [N, S]
    prediction: Tensor
    x: Tensor
    x0_prev: Tensor | None
    rows: Tensor  # [K, 8]
    number: int
    key: Tensor  # [2]
    sample_index: Tensor  # [N]
    clip: bool
    noisy: bool
    x_next: Tensor
    x0: Tensor | None


class Recorder:
    """Stands between a loop and its step functions, and keeps what passes."""

    def __init__(self, loop: sampling.SamplingLoop) -> None:
        self.steps, self.functions = list[Step](), loop.functions
        self.given = (torch.empty(0), torch.empty(0))
        loop.functions = loop.functions._replace(denoise=self.denoise, reverse_step=self.reverse_step)

    def denoise(self, x: Tensor, shifts: Tensor) -> Tensor:
        self.given = (x.clone(), shifts.clone())
        return self.functions.denoise(x, shifts)

    def reverse_step(self, x: Tensor, prediction: Tensor, *rest: Tensor, **options: Any) -> None:
        rows, step, key, sample_index = rest
        x0, flags = options.get("x0"), {"clip": options["clip"], "noisy": options["noisy"]}
        before = [*self.given, prediction.clone(), x.clone(), None if x0 is None else x0.clone(), rows.clone()]
        before += [int(step), key.clone(), sample_index.clone()]
        self.functions.reverse_step(x, prediction, *rest, **options)
        made = {"x_next": x.clone(), "x0": None if x0 is None else x0.clone()}
        self.steps.append(Step(*before, **flags, **made))


class Network(NamedTuple):
    """A U-Net to sample with."""

    unet: UNet
    """On the device to run on."""
    training: UNet
    """The same in training, without dropout."""
    what: str
    """What to say of it, if it is not the run's."""


@torch.no_grad()
def check_loop(
    network: Network, diffusion: DiffusionConfig, sampler: SamplerConfig, dtype: torch.dtype, count: int
) -> Iterator[CheckResult]:
    """Check a loop's book-keeping, the network in it, and its reverse steps.

    Args:
        network: what to sample with.
        diffusion, sampler: what to sample.
        dtype: of the U-Net's arithmetic in sampling.
        count: how many images.
    """
    table, unet = samplers.sampler_table(diffusion, sampler), network.unet
    wanted = asked_of(unet, replace(IMAGES, count=count), guided=sampler.eta > 0 or sampler.sampler == "dpm++")
    loop = sampling.SamplingLoop(unet, table, dtype, guide=unet if wanted.guidance != 1 else None)
    what = f"{name_of(sampler, table)}{network.what}" + (", guided" if loop.guide else "")
    recorder, seen = Recorder(loop), list[Tensor]()
    made = images_of(loop, wanted, lambda k, x: seen.append(x.clone()))
    # Images that are not finite are made no further than the batch that shows it.
    batches = -(-count // BATCH) if made is not None else max(1, len(recorder.steps) // len(table.rows))
    wrong = next(_faults_between(loop, recorder.steps, wanted, batches), "") or _fault_of_results(
        recorder.steps, seen, made
    )
    name, expected = f"{what}: the loop takes its rows in turn", "every row, from the x and x0 of the row before"
    yield CheckResult("sampler", name, judged(not wrong), expected, wrong or expected, LOOP)
    steps = [step for step in recorder.steps if _is_moderate(step.x)]
    if steps:
        yield _check_network(network.training, steps, what, dtype, wanted)
        yield _check_reverse_steps(loop, steps, what)
    if made is None:
        name, found = f"{what}: images are finite", "infinite ones: 1 / sqrt(alpha_bar) is too large"
        yield CheckResult("sampler", name, Verdict.CHANGED, "numbers", found, "--clip, --timesteps or --beta-end")


def images_of(
    loop: sampling.SamplingLoop, images: sampling.ImageRange, on_step: sampling.OnStep | None = None
) -> Tensor | None:
    """Sample, or return None where a value is not finite, as it may be with weights that were never trained."""
    try:
        return torch.cat([x for _, x in sampling.stream(loop, images, BATCH, on_step=on_step)])
    except MathematicsError:
        return None


def _is_moderate(*values: Tensor) -> bool:
    """Whether all values are numbers with which float32 can be held to float64."""
    return all(bool((value.abs() < LARGE).all()) for value in values)


def _faults_between(
    loop: sampling.SamplingLoop, steps: list[Step], images: sampling.ImageRange, batches: int
) -> Iterator[str]:
    """Say what goes wrong between the steps of the batches, the first first."""
    rows, numbers = loop.table.rows.float().cpu(), torch.arange(images.first, images.first + images.count)
    K, unet = len(rows), loop.unet.config
    if len(steps) != K * batches:
        yield f"{len(steps)} steps for {batches} batches of {K} rows"
        return
    for i, step in enumerate(steps):
        batch, k = divmod(i, K)
        where, mine = f"step {k} of batch {batch}", numbers[batch * len(step.x) : (batch + 1) * len(step.x)]
        if tuple(step.x.shape[1:]) != (shape := (unet.image_channels, unet.height, unet.width)):
            yield f"{where} makes images of {tuple(step.x.shape[1:])}, not {shape}"
        if step.number != k:
            yield f"{where} takes row {step.number}"
        if not _same(step.rows.cpu(), rows):
            yield f"{where} has other rows than the table"
        if (step.clip, step.noisy) != (loop.table.clip, loop.table.noisy):
            yield f"{where} has clip {step.clip} and noisy {step.noisy}, unlike the table"
        if not torch.equal(step.key.cpu(), key_from_seed(images.seed)):
            yield f"{where} has the noise of another seed"
        if not torch.equal(step.sample_index.cpu()[: len(mine)], mine):
            yield f"{where} has the noise of other images"
        if (step.x0_prev is None) == loop.table.multistep:
            yield f"{where} has {'no' if loop.table.multistep else 'an'} x0 of the step before"
        halves = len(step.model_input) // len(step.x)  # two: with and without label
        if not _same(step.model_input, step.x.to(step.model_input.dtype).repeat(halves, 1, 1, 1)):
            yield f"{where} shows the network another x"
        if k > 0:
            yield from (f"{where} {fault}" for fault in _lost(steps[i - 1], step))


def _lost(last: Step, step: Step) -> Iterator[str]:
    """Say what a step does not have from the step before."""
    if not _same(step.x, last.x_next):
        yield "does not start from the x of the step before"
    if step.x0_prev is not None and last.x0 is not None and not _same(step.x0_prev, last.x0):
        yield "has lost the x0 of the step before"


def _fault_of_results(steps: list[Step], seen: list[Tensor], made: Tensor | None) -> str:
    """Say whether who looks at every step, or waits for the images, is shown something else than the steps made."""
    if len(seen) != len(steps) or not all(_same(x, step.x_next) for x, step in zip(seen, steps, strict=True)):
        return "what is shown after each step is not the step's x"
    last = torch.cat([step.x_next for step in steps if step.number == len(step.rows) - 1]).cpu()
    return "" if made is None or torch.equal(last[: len(made)], made) else "what is returned is not the last x"


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the distance of two tensors by the size of the second; infinite if a value is not finite."""
    off = float((found.double() - expected.double()).norm() / expected.double().norm())
    return off if off == off else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    """Return by how much a network's outputs may differ from themselves in float32."""
    tf32 = torch.cuda.is_available() and torch.backends.cudnn.allow_tf32
    return OUTPUTS[dtype] if tf32 or dtype != torch.float32 else EXACT


def without_dropout(unet: UNet, dtype: torch.dtype) -> UNet:
    """Return a U-Net in training with the same weights, of that precision as in training, that drops nothing."""
    with torch.device("meta"):
        plain = UNet(replace(unet.config, dropout=0.0)).use(unet.ops)
    plain.load_state_dict(unet.state_dict(), assign=True)
    for parameter in plain.low_precision_parameters().values():
        parameter.data = parameter.data.to(dtype)
    return plain.train()


def _check_network(
    training: UNet, steps: list[Step], what: str, dtype: torch.dtype, images: sampling.ImageRange
) -> CheckResult:
    """Check that the network gives what training's gives for the same x and the row's t, without dropout.

    A conditional one for its images' labels, and guided as asked for.
    """
    name = f"{what}: the network is training's"
    expected = "its output for the same x and the t of the row, without dropout"
    allowed = tolerance(dtype) * (2 * images.guidance - 1)
    t = torch.stack([step.rows[step.number, SAMPLER_COLUMN.t] for step in steps]).long()
    shifts = training.time_shifts(t)
    for step, at, shift in zip(steps, t, shifts, strict=True) if not images.labels else ():
        off = relative(step.shifts, shift.expand_as(step.shifts))
        if off > allowed:
            found = f"another time embedding than that of t = {int(at)}: {off:.1e} off in row {step.number}"
            return CheckResult("network", name, judged(False), expected, found, NETWORK)
    size, numbers = len(steps[0].x), torch.cat([step.sample_index for step in steps])
    x = torch.cat([step.model_input[:size] for step in steps])
    truth = predicted(training, x, t.repeat_interleave(size), numbers, images).split(size)
    off = [relative(step.prediction, right) for step, right in zip(steps, truth, strict=True)]
    worst = max(range(len(steps)), key=lambda i: off[i])
    if allowed < off[worst] < MOST_ROUNDING and dtype == torch.float32:
        allowed += ROUNDINGS * _rounding_of(training, steps[worst], t[worst : worst + 1])
    found = f"{off[worst]:.1e} off in row {steps[worst].number} (t = {int(t[worst])})"
    return CheckResult("network", name, judged(off[worst] <= allowed), expected, found, NETWORK)


def _rounding_of(training: UNet, step: Step, t: Tensor) -> float:
    """Return how far the network's output is from itself in float64, relative to its size.

    That is far where a group of a norm holds one number: it has no variance, so rounding is divided by sqrt(1e-6).
    """
    exact = copy.deepcopy(training).double().use(REFERENCE)
    x, t = step.model_input[: len(step.x)], t.expand(len(step.x))
    return relative(training(x, t), exact(x.double(), t))


def _noise_of(loop: sampling.SamplingLoop, step: Step) -> Tensor:
    """Return the noise that the step adds, by its own op and a row of which nothing but the noise is left."""
    rows = torch.zeros_like(step.rows)
    rows[:, SAMPLER_COLUMN.noise] = 1
    z, number = step.x.clone(), torch.full((1,), step.number, dtype=torch.int64, device=step.x.device)
    address = (number, step.key, step.sample_index)
    loop.eager.reverse_step(z, step.prediction, rows, *address, clip=False, noisy=True)
    return z


def _check_reverse_steps(loop: sampling.SamplingLoop, steps: list[Step], what: str) -> CheckResult:
    """Check that each step does what its row says to its own x, prediction, x0 of the step before and noise."""
    file = "kernels/reverse_step.py" if loop.unet.ops.fused else "ddpm_fast/ops/reference.py"
    name, expected = f"{what}: each step does what its row says", "x0, the next x and the noise, but for rounding"
    for step in steps:
        if not _is_moderate(step.prediction, step.rows[step.number]):
            continue
        shape, z = (1, -1), _noise_of(loop, step)
        row = rows_of(step.rows[step.number][None], step.noisy, step.x0_prev is not None)
        given = Given(*(value.double().reshape(shape) for value in (step.x, step.prediction, z)))
        x0_prev = torch.zeros_like(given.x) if step.x0_prev is None else step.x0_prev.double().reshape(shape)
        x0, x0_size = x0_of(row, step.clip, given)
        x_next, size = next_of(row, x0, x0_prev, given)
        pairs = {"the next x": (step.x_next, x_next, size + row.next_from_x0.abs() * x0_size)}
        if step.x0 is not None:
            pairs = {"x0": (step.x0, x0, x0_size), **pairs}
        for part, (found, right, scale) in pairs.items():
            if bool((right.abs() >= LARGE).any()):  # but not if it is not a number
                continue
            off = (found.double().reshape(shape) - right).abs()
            if not bool((off <= ROUNDING * scale + 1e-7).all()):
                found = f"{part} is {float(off.max()):.1e} off in row {step.number}"
                return CheckResult("sampler", name, judged(False), expected, found, file)
    return CheckResult("sampler", name, judged(True), expected, expected, file)
