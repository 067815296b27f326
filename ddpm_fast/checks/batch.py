"""What becomes of a batch on its way to the network: order, range, flips, timesteps, noise, x_t.

Each stage is recomputed from what the engine was recorded doing before it.
Shapes: N images, C channels, H x W pixels, T timesteps.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import textbook
from ddpm_fast.checks.recording import TrainingStep, distance
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.constants import TRAINING_COLUMN, Stream, TrainingTable
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed, normal, random_timesteps
from ddpm_fast.engine.trainer import Trainer

SIGMAS = 5.0
FLIPS = 64
"""Examples whose flips are counted."""
FLOAT32 = torch.finfo(torch.float32).eps
X_T_BOUND = 8 * FLOAT32
EPS_BOUND = 1e-5
"""Of normals up to 6.7, whose sines and cosines are of angles rounded to 4e-7."""
TRAINER, NOISE, DATA = (f"ddpm_fast/{path}.py" for path in ("engine/trainer", "diffusion/noise", "data/batches"))
X_START: TrainingTable[float] = TrainingTable(1.0, 0.0, 0.0, 1.0, 1.0)
EPS: TrainingTable[float] = TrainingTable(0.0, 1.0, 1.0, 0.0, 1.0)
"""Rows of a table with which q_sample shows what it made: x_start, or the noise."""
Made = list[tuple[Tensor, Tensor]]
"""x_start and eps of each step's whole batch: [N, C, H, W] each."""


def check_batch(trainer: Trainer, steps: list[TrainingStep], made: Made) -> Iterator[CheckResult]:
    """Check what becomes of a batch: its order, its range, what is flipped, its t and its noise."""
    yield _check_order(steps)
    yield from _check_images(trainer, steps, made)
    yield _check_timesteps(trainer, steps)
    yield _check_noise(trainer, steps, made)
    yield _check_same_example(steps)


def _check_order(steps: list[TrainingStep]) -> CheckResult:
    name, file = "a step reads its own examples, in order", f"{TRAINER} or {DATA}"
    for step in steps:
        n = step.config.training.batch_size
        first, used, given = step.number * n, *(step.joined("q_sample", name) for name in ("sample_index", "images"))
        numbered = torch.equal(used, torch.arange(first, first + n, device=used.device))
        taken = [images for start, count, images, *_ in step.batches if (start, count) == (first, n)]
        if not numbered or not taken or not (given.is_floating_point() or torch.equal(given, taken[0])):
            expected = f"examples {first} to {first + n - 1} in step {step.number}"
            found = f"{len(used)}, numbered from {int(used.min())} to {int(used.max())}"
            found = "other images under these numbers" if numbered else found
            return CheckResult("order", name, judged(False), expected, found, file)
        if step.next_number != step.number + 1:
            found = f"step {step.next_number} after step {step.number}"
            return CheckResult("order", name, judged(False), "the next step", found, TRAINER)
    return CheckResult("order", name, judged(True), "step * batch size and what follows", "so", file)


def what_q_sample_makes(trainer: Trainer, step: TrainingStep) -> tuple[Tensor, Tensor]:
    """Return x_start and eps as q_sample makes them of the recorded batch: [N, C, H, W] each."""
    calls = step.ops["q_sample"]
    x_start, eps = (torch.cat([_with_row(trainer, call.given, row) for call in calls]) for row in (X_START, EPS))
    return x_start, eps


def _with_row(trainer: Trainer, given: dict[str, Any], row: TrainingTable[float]) -> Tensor:
    table = torch.tensor([row], device=trainer.device).repeat(trainer.config.diffusion.timesteps, 1)
    return trainer.unet.ops.q_sample(**(given | {"table": table}))


def _q_sample_file(trainer: Trainer) -> str:
    return "kernels/q_sample.py" if trainer.unet.ops.fused else "ddpm_fast/ops/reference.py"


def _check_images(trainer: Trainer, steps: list[TrainingStep], made: Made) -> Iterator[CheckResult]:
    file, bound = _q_sample_file(trainer), 8 * FLOAT32
    mirrored = False
    name, expected, found = "images reach the network in [-1, 1]", "pixel / 127.5 - 1", ""
    for step, (x_start, _) in zip(steps, made, strict=True):
        plain = step.pixels().double() / 127.5 - 1
        off, off_mirrored = ((x_start - wanted).abs().amax((1, 2, 3)) for wanted in (plain, plain.flip(-1)))
        mirrored |= bool((off > bound).any())
        if bool((torch.minimum(off, off_mirrored) > bound).any()):
            expected = f"pixel / 127.5 - 1, here {float(plain.min()):.3f} to {float(plain.max()):.3f}"
            found = f"{float(x_start.min()):.3f} to {float(x_start.max()):.3f}"
    yield CheckResult("data", name, judged(not found), expected, found or "so", file)
    if found:
        return
    if not trainer.config.data.flip:
        yield CheckResult(
            "flip", "no image is flipped", judged(not mirrored), "none", "some" if mirrored else "none", file
        )
        return
    flips = _count_flips(trainer, steps[0])
    right, name = abs(flips - FLIPS / 2) <= SIGMAS * FLIPS**0.5 / 2, "half of the images are flipped"
    yield CheckResult("flip", name, judged(right), f"about {FLIPS // 2} of {FLIPS}", f"{flips}", f"{file} or {NOISE}")


def _count_flips(trainer: Trainer, step: TrainingStep) -> int:
    """Return how many examples of the same image are flipped; of an image that is its own mirror image, half."""
    given = step.ops["q_sample"][0].given
    images = given["images"]
    uneven = (images.double() - images.double().flip(-1)).abs().sum((1, 2, 3))
    chosen = int(uneven.argmax())
    image = images[chosen : chosen + 1].expand(FLIPS, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    numbers, t = torch.arange(FLIPS, device=trainer.device), given["t"][:1].expand(FLIPS).contiguous()
    x_start = _with_row(trainer, given | {"images": image, "sample_index": numbers, "t": t}, X_START).double()
    plain = image.double() if image.is_floating_point() else image.double() / 127.5 - 1
    if not uneven[chosen]:
        return FLIPS // 2
    return int(((x_start - plain).abs().amax((1, 2, 3)) > 8 * FLOAT32).sum())


def _check_timesteps(trainer: Trainer, steps: list[TrainingStep]) -> CheckResult:
    total = trainer.config.diffusion.timesteps
    name, found = "t is drawn from 0 to T - 1, for each example by its number", "so"
    config, thresholds = trainer.config, None
    if config.training.timestep_density == "laplace" and total > 1:
        up_to = textbook.laplace_shares(config.diffusion).cumsum(0)[:-1]
        thresholds = (up_to * 2**32).round().long().to(trainer.device)
    for step in steps:
        t = step.joined("q_sample", "t")
        address = NoiseAddress(trainer.key, step.joined("q_sample", "sample_index"))
        expected = random_timesteps(address, total, thresholds)
        if t.is_floating_point() or not torch.equal(t, expected):
            found = f"{t.tolist()}, not {expected.tolist()}, in step {step.number}"
    return CheckResult("timesteps", name, judged(found == "so"), f"0 to {total - 1}", found, f"{TRAINER} or {NOISE}")


def _check_noise(trainer: Trainer, steps: list[TrainingStep], made: Made) -> CheckResult:
    name, expected, off = "eps is the noise of its seed, example and pixel", "normal noise by its address", 0.0
    key = key_from_seed(trainer.config.training.seed, trainer.device)
    for step, (_, eps) in zip(steps, made, strict=True):
        address = NoiseAddress(key, step.joined("q_sample", "sample_index"))
        shape = (eps.shape[1], eps.shape[2], eps.shape[3])
        off = max(off, float((eps - normal(address, 0, Stream.TRAINING, shape, torch.float64)).abs().max()))
    right = off < EPS_BOUND
    return CheckResult(
        "noise", name, judged(right), expected, f"{off:.1e} off", f"{_q_sample_file(trainer)} or {NOISE}"
    )


def _check_same_example(steps: list[TrainingStep]) -> CheckResult:
    name, found = "the loss is told the example that q_sample was told", "the same"
    for step in steps:
        for argument in ("images", "t", "table", "key", "sample_index"):
            one, other = step.joined("q_sample", argument), step.joined("noise_mse", argument)
            found = found if torch.equal(one, other) else f"another {argument} in step {step.number}"
        flips = [[call.given.get("flip", False) for call in step.ops[op]] for op in ("q_sample", "noise_mse")]
        found = found if flips[0] == flips[1] else "flipped in one of the two only"
    return CheckResult("target", name, judged(found == "the same"), "the same", found, TRAINER)


def check_x_t(trainer: Trainer, steps: list[TrainingStep], made: Made) -> CheckResult:
    """Check that x_t is made of x_start and eps as the table says (Equation 4)."""
    name, expected, found = "x_t is made of x_start and eps", "signal[t] * x_start + noise[t] * eps", "so"
    for step, (x_start, eps) in zip(steps, made, strict=True):
        rows = step.ops["q_sample"][0].given["table"].double()[step.joined("q_sample", "t")]
        signal, noise = (
            rows[:, column].view(-1, 1, 1, 1) for column in (TRAINING_COLUMN.signal, TRAINING_COLUMN.noise)
        )
        off = distance(step.returned("q_sample"), signal * x_start + noise * eps)
        found = found if off <= X_T_BOUND else f"{off:.1e} off, relative to its size, in step {step.number}"
    return CheckResult("q_sample", name, judged(found == "so"), expected, found, _q_sample_file(trainer))
