"""Is the mathematics right, here, now?

Each line says what was expected, what was found, and which file to look at. Everything is judged from outside: the
ops are run and their results compared with formulas derived another way, so that a changed line shows.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_fast.checks.kernels import check_kernels, kernel_table
from ddpm_fast.checks.process import (
    CheckResult,
    check_noise,
    check_samplers,
    check_schedule,
    closed_form_target,
    training_noise,
)
from ddpm_fast.config import Config, with_training
from ddpm_fast.constants import Row, TrainingTable
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed, random_timesteps
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import choose_dtype
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.ops import RULE, choose_ops
from ddpm_fast.ops.reference import ema_decay_at
from ddpm_fast.runs.checkpoint import TENSOR_FILES, Checkpoint

EXAMPLES = 8
"""Training examples that the checks of the network use."""
QUICK_STEPS, FULL_STEPS = 2, 100
"""Steps on one fixed batch, by the quick part and in full."""


def report(lines: Iterator[CheckResult], full: bool = False) -> int:
    """Print every line as it comes; of the quick part one line, and every line if any failed.

    Returns:
        The exit status: 0, or 3 if any failed.
    """
    started, done = time.perf_counter(), []
    print("checking the mathematics" + (" in full" if full else ": "), end="\n" if full else "", flush=True)
    for line in lines:
        done.append(line)
        if full:
            print(_shown(line), flush=True)
    failed = sum(not line.passed for line in done)
    if failed and not full:
        print("\n" + "\n".join(map(_shown, done)))
    print(
        f"{failed} of {len(done)} checks failed: the mathematics is wrong"
        if failed
        else f"{len(done)} checks passed in {time.perf_counter() - started:.1f} s"
    )
    return 3 if failed else 0


def _shown(line: CheckResult) -> str:
    mark, tail = ("ok  ", "") if line.passed else ("FAIL", f"; look at {line.file}")
    return f"  {mark} {line.name}: expected {line.expected}, found {line.found}{tail}"


def report_kernels(config: Config, device: torch.device) -> int:
    """Print which ops run kernels and, where any do, the table of them; return the exit status: 0, or 3."""
    print(f"kernels: {RULE}")
    ops = choose_ops(config.training.kernels, device)
    if not ops.fused:
        print("  none run here: " + (f"the device is {device.type}" if config.training.kernels else "--no-kernels"))
        return 0
    right = True
    for row, within_bound in kernel_table(ops, config, device, choose_dtype(config.training.precision, device)):
        print(f"  {row}" + ("" if within_bound else "  FAIL"), flush=True)
        right &= within_bound
    return 0 if right else 3


def check_start(config: Config, dataset: Dataset, device: torch.device) -> Iterator[CheckResult]:
    """Check what takes seconds: run before step 0."""
    yield from _check_everything_but_fitting(config, dataset, device, None)
    yield from check_fitting(_small_trainer(config, dataset, device, None), QUICK_STEPS)


def check_run(
    config: Config, dataset: Dataset, device: torch.device, found: Checkpoint | None
) -> Iterator[CheckResult]:
    """Check everything, for a trained run or for what a configuration describes."""
    yield from _check_everything_but_fitting(config, dataset, device, found)
    yield from check_fitting(_small_trainer(config, dataset, device, None), FULL_STEPS)


def _check_everything_but_fitting(
    config: Config, dataset: Dataset, device: torch.device, found: Checkpoint | None
) -> Iterator[CheckResult]:
    shape = (config.unet.image_channels, config.unet.height, config.unet.width)
    trainer = _small_trainer(config, dataset, device, found)
    ops = trainer.unet.ops
    yield from check_noise(shape, device, ops)
    yield from check_schedule(config.diffusion)
    yield from check_data(trainer, shape)
    yield from check_forward_process(trainer)
    yield from check_samplers(config.diffusion, device, ops)
    if ops.fused:
        yield from check_kernels(ops, config, device, choose_dtype(config.training.precision, device))
    yield from check_network(trainer, trained=found is not None)


def _small_trainer(config: Config, dataset: Dataset, device: torch.device, found: Checkpoint | None) -> Trainer:
    """Build a trainer of the same network on a handful of fixed examples, in float32."""
    config = with_training(config, batch_size=EXAMPLES, accumulate=1, warmup_steps=0, precision="fp32")
    config = replace(config, unet=replace(config.unet, dropout=0.0))
    source = BatchSource(dataset, key_from_seed(config.training.seed), device)
    trainer = Trainer(config, lambda first, n: source.batch(0, n), device)
    if found is not None:
        trainer.load_state(found.step, {part: found.tensors(part) for part in TENSOR_FILES})
    return trainer


def _first_batch(trainer: Trainer) -> tuple[Tensor, Tensor, Tensor]:
    images, sample_index = trainer.batch(0, EXAMPLES)
    return (
        images,
        sample_index,
        random_timesteps(NoiseAddress(trainer.key, sample_index), trainer.config.diffusion.timesteps),
    )


def check_data(trainer: Trainer, shape: tuple[int, int, int]) -> Iterator[CheckResult]:
    """Check that images fit the U-Net and reach it in [-1, 1]."""
    images, sample_index, _ = _first_batch(trainer)
    fits = tuple(images.shape[1:]) == shape and images.dtype == torch.uint8
    found = f"{tuple(images.shape[1:])} {images.dtype}"
    yield CheckResult("images fit the U-Net", fits, f"{shape} torch.uint8", found, "ddpm_fast/data/dataset.py")
    row = TrainingTable(signal=1.0, noise=0.0, target_eps=0.0, target_x_start=1.0, weight=1.0)
    table, t = torch.tensor([row], device=images.device), torch.zeros_like(sample_index)
    x_start = trainer.unet.ops.q_sample(images, t, table, trainer.key, sample_index)
    low, high = float(x_start.min()), float(x_start.max())
    fine = low >= -1 and high <= 1 and high - low > 0.1
    found = f"{low:.3f}..{high:.3f}"
    yield CheckResult("data lies in [-1, 1]", fine, "-1..1, not constant", found, "ddpm_fast/ops/reference.py")


def check_forward_process(trainer: Trainer) -> Iterator[CheckResult]:
    """Check that q_sample, the target and the sampler's table agree on t, signs and coefficients."""
    diffusion, file = trainer.config.diffusion, "ddpm_fast/ops/reference.py or ddpm_fast/diffusion/samplers.py"
    images, sample_index, _ = _first_batch(trainer)
    # Where alpha_bar is tiny, float32 cannot give x_start back: stay in the lower nine tenths.
    t = (torch.arange(EXAMPLES, device=images.device) * (diffusion.timesteps * 9 // 10)) // EXAMPLES
    x_start = (images.double() / 127.5 - 1).float()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    ops = trainer.unet.ops
    eps = training_noise(sample_index, shape, trainer.config.training.seed, ops)
    target = closed_form_target(diffusion, t, x_start.double(), eps.double())
    x_t = ops.q_sample(images, t, trainer.table, trainer.key, sample_index)
    row = Row(*sampler_table(diffusion).rows.to(images.device).flip(0)[t].unbind(1))
    from_x, from_prediction = (column.view(-1, 1, 1, 1) for column in (row.x0_from_x, row.x0_from_prediction))
    off = float((from_x * x_t - from_prediction * target - x_start).abs().max())
    expected = "x_start again within 1e-3"
    yield CheckResult(
        "q_sample, then predicting x_start, gives the data back", off < 1e-3, expected, f"{off:.1e} off", file
    )
    loss = float(ops.noise_mse(target, images, t, trainer.table, trainer.key, sample_index).max())
    name = f"the loss of the true {diffusion.prediction} is 0"
    file = "ddpm_fast/ops/reference.py or ddpm_fast/diffusion/schedule.py"
    yield CheckResult(name, loss < 1e-6, "below 1e-6", f"{loss:.1e}", file)


def check_network(trainer: Trainer, trained: bool) -> Iterator[CheckResult]:
    """Check the first loss, every parameter's gradient, and that t reaches the output."""
    file = "ddpm_fast/model/unet.py or ddpm_fast/engine/trainer.py"
    if not trained:
        images, sample_index, t = _first_batch(trainer)
        zeros = torch.zeros_like(images, dtype=torch.float32)
        example = (images, t, trainer.table, trainer.key, sample_index)
        nothing = float(trainer.unet.ops.noise_mse(zeros, *example).mean())
        first = float(trainer.losses(0, EXAMPLES).mean().detach())
        expected = f"{nothing:.4f} within 2%"
        yield CheckResult(
            "the first loss is that of predicting nothing",
            abs(first / nothing - 1) < 0.02,
            expected,
            f"{first:.4f}",
            file,
        )
    trainer.load_batch()
    trainer.backward()
    # A constant added to every key cancels in softmax: that bias alone has no gradient.
    silent = [
        name
        for name, gradient in trainer.gradients.items()
        if not (torch.isfinite(gradient).all() and gradient.any()) and not name.endswith("to_k.bias")
    ]
    found = f"{len(silent)} without, e.g. {silent[0]}" if silent else "all have one"
    yield CheckResult("every parameter receives a finite gradient", not silent, "all", found, file)
    images, _, t = _first_batch(trainer)
    x, first = images.float() / 127.5 - 1, torch.zeros_like(t)
    with torch.no_grad():
        early, late = trainer.unet(x, first), trainer.unet(x, first + trainer.config.diffusion.timesteps - 1)
    # Residual branches start at 1e-5 of the trunk, so at first t moves the output by about that; without t, by 0.
    change = float((early - late).norm() / early.norm())
    yield CheckResult("the output depends on t", change > 1e-7, "a relative change above 1e-7", f"{change:.1e}", file)


def check_fitting(trainer: Trainer, steps: int) -> Iterator[CheckResult]:
    """Check that the average follows and that a handful of images can be overfitted."""
    file = "ddpm_fast/engine/trainer.py"
    before = {name: tensor.clone() for name, tensor in trainer.ema.items()}
    trainer.train_step_no_sync()
    decay = float(ema_decay_at(torch.zeros(()), trainer.config.training.ema_decay))
    weights = dict(trainer.unet.named_parameters())
    off = max(
        float((trainer.ema[name] - (decay * before[name] + (1 - decay) * weights[name].detach())).abs().max())
        for name in before
    )
    moved = any(bool((trainer.ema[name] != before[name]).any()) for name in before)
    found = f"{off:.1e} off" if moved else "it does not move"
    yield CheckResult("the weights' average follows", moved and off < 1e-6, f"decay {decay:.2f} at step 0", found, file)
    first = trainer.read_loss()
    for _ in range(steps):
        trainer.step = 0  # the same examples with the same noise again
        trainer.train_step_no_sync()
    last = float(trainer.losses(0, EXAMPLES).mean().detach())
    share = 0.5 if steps >= FULL_STEPS else 1.0
    yield CheckResult(
        f"{EXAMPLES} fixed examples are learned in {steps} steps",
        last < share * first,
        f"a loss below {share * first:.3f}",
        f"{last:.3f}",
        file,
    )
