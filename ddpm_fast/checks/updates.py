"""Is what a step does with its gradient the textbook's: clipping, Adam, the learning rate, the moving average?

The textbook's own `train` takes each step again, from the engine's recorded gradient, weights, moments and average: its
network is one whose gradient is given, and whose weights are the engine's P numbers that learn, side by side.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddpm_fast import textbook
from ddpm_fast.checks.recording import TrainingStep
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, UNetConfig

ENGINE = "ddpm_fast/engine/flat_weights.py or ddpm_fast/engine/trainer.py"
FLOAT32 = torch.finfo(torch.float32).eps
CLIP_BOUND = 1e-3
"""Relative: what was clipped is read off moments, which are float32."""
MOMENT_BOUND = 1e-4
RATE_BOUND = 1e-2
UPDATE_BOUND = 200 * FLOAT32
"""Of the learning rate, beside the rounding of the weight: Adam's step is at most some learning rates long."""


class GivenGradient(torch.autograd.Function):
    """Something to differentiate whose gradient by the weights is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, weights: Tensor) -> Tensor:
        ctx.gradient = gradient
        return x * 0

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, ctx.gradient


class Weights(nn.Module):
    """A network of which only its weights and their gradient matter, [P] each."""

    def __init__(self, weights: Tensor, gradient: Tensor) -> None:
        super().__init__()
        self.weights, self.gradient = nn.Parameter(weights.clone()), gradient

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return GivenGradient.apply(x, self.gradient, self.weights)  # pyright: ignore[reportReturnType]


class NoNoise:
    """Random numbers for a batch of which nothing matters."""

    def randint(self, high: int, shape: tuple[int]) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    def rand(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)

    randn = rand


class Adam(torch.optim.Adam):
    """PyTorch's, without what its methods ask torch.compile first: to import that takes a second."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


@contextmanager
def _quick_adam() -> Iterator[None]:
    own = torch.optim.Adam
    torch.optim.Adam = Adam
    try:
        yield
    finally:
        torch.optim.Adam = own


class FlatStep:
    """A recorded step with all parameters that learn side by side, as the engine has them: [P] float64 each."""

    def __init__(self, step: TrainingStep) -> None:
        self.step, self.number, self.training = step, step.number, step.config.training
        self.names = list(step.gradients)
        self.sizes = [gradient.numel() for gradient in step.gradients.values()]
        self.gradient = self._flat(step.gradients)
        self.before, self.after = (
            {part: self._flat(tensors) for part, tensors in state.items()} for state in (step.before, step.after)
        )

    def _flat(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in self.names]).double()

    def sums(self, values: Tensor) -> Tensor:
        """Add up numbers [P] by parameter."""
        return torch.stack([part.sum() for part in values.split(self.sizes)])

    def repeated(self, values: Tensor) -> Tensor:
        """Give each number the value of its parameter: [P]."""
        return torch.cat([value.expand(size) for value, size in zip(values, self.sizes, strict=True)])

    def lengths(self, values: Tensor) -> Tensor:
        """Return the norm of numbers [P] by parameter."""
        return torch.stack([part.norm() for part in values.split(self.sizes)])

    def first_of(self, wrong: Tensor) -> tuple[str, slice] | None:
        """Return the first parameter of which something [P] is wrong, and where it lies."""
        end = 0
        for name, part in zip(self.names, wrong.split(self.sizes), strict=True):
            end += len(part)
            if bool(part.any()):
                return name, slice(end - len(part), end)
        return None


@dataclass
class Update:
    """What the textbook makes of a recorded step's gradient: [P] float64 each."""

    length: float
    """Of the gradient before it is clipped."""
    clipped: Tensor = field(default_factory=lambda: torch.empty(0))
    learning_rate: float = 0.0
    after: dict[str, Tensor] = field(default_factory=dict)
    """By what it is, as in `recording.State`."""

    @property
    def rounding(self) -> float:
        """Return how far clipped gradients may differ: PyTorch divides by the length plus 1e-6, the engine by it."""
        return 4e-6 / max(self.length, 1e-30)


def textbook_update(step: FlatStep, gradient: Tensor, clip: bool = True) -> Update:
    """Let the textbook clip, take Adam's step from the engine's moments, and move the average.

    The average follows the engine's own new weights, so that a wrong update does not show in it as well.
    """
    update = Update(length=float(gradient.norm()))
    unet, ema = Weights(step.before["model"], gradient), Weights(step.before["ema"], gradient)
    clip_norm = step.training.clip_norm if clip else 0.0
    training = replace(step.training, clip_norm=clip_norm, min_snr_gamma=0.0)
    config = Config(unet=UNetConfig(), diffusion=DiffusionConfig(), data=DataConfig(), training=training)

    def before(optimizer: Any, *_: Any) -> None:
        update.learning_rate = optimizer.param_groups[0]["lr"]
        assert unet.weights.grad is not None
        update.clipped = unet.weights.grad.clone()
        if step.step.updates:
            moments = {moment: step.before[moment].clone() for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[unet.weights] = {"step": torch.tensor(float(step.step.updates)), **moments}

    @torch.no_grad()
    def after(optimizer: Any, *_: Any) -> None:
        update.after["model"] = unet.weights.detach().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            update.after[moment] = optimizer.state[unet.weights][moment]
        unet.weights.copy_(step.after["model"])

    with ExitStack() as stack:
        stack.enter_context(_quick_adam())
        stack.callback(register_optimizer_step_pre_hook(before).remove)
        stack.callback(register_optimizer_step_post_hook(after).remove)
        next(textbook.train(unet, ema, [(step.number, torch.zeros(1, 1, 1, 1))], config, NoNoise()))
    update.after["ema"] = ema.weights.detach()
    return update


def check_updates(recorded: list[TrainingStep], fused: bool) -> Iterator[CheckResult]:
    """Check clipping, Adam's step with its learning rate, and the average of every recorded step."""
    file = f"{'kernels/adam_ema.py' if fused else 'ddpm_fast/ops/reference.py'}, {ENGINE}"
    steps = [FlatStep(step) for step in recorded]
    updates = [textbook_update(step, step.gradient) for step in steps]
    clipping = _check_clipping(steps, updates, file)
    yield clipping
    if not clipping.passed:  # then Adam is checked with what the engine made of its gradient
        updates = [textbook_update(step, _added(step, "exp_avg", 0.1) / 0.1, clip=False) for step in steps]
    yield from _check_optimizer(steps, updates, file)
    yield _check_ema(steps, updates, file)


def _added(step: FlatStep, moment: str, share: float) -> Tensor:
    """Return what Adam added to a moment: that share of what it saw."""
    return step.after[moment] - (1 - share) * step.before[moment]


def _check_clipping(steps: list[FlatStep], updates: list[Update], file: str) -> CheckResult:
    """Check by how much gradients were scaled; both of Adam's moments must say so, else it is not the clipping."""
    name = "the gradient is clipped to its norm, all parameters together"
    for step, update in zip(steps, updates, strict=True):
        gradient, squares, added = step.gradient, step.gradient.square(), _added(step, "exp_avg", 0.1)
        length = step.lengths(gradient)
        found = step.sums(added * gradient) / length.square() / 0.1
        rest = step.lengths(added - 0.1 * step.repeated(found) * gradient) / (0.1 * found * length)
        scaled = (found > 0) & (rest < CLIP_BOUND)  # else something other than scaling became of it
        share = 1 - step.training.adam_beta2
        square = step.sums(_added(step, "exp_avg_sq", share) * squares) / step.sums(squares.square()) / share
        expected = step.lengths(update.clipped) / length
        wrong = (found - expected).abs() > (CLIP_BOUND + update.rounding) * expected
        wrong &= scaled & ((square - found.square()).abs() < 0.05 * found.square())
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            wanted = (
                f"a gradient of length {update.length:.3g} in step {step.number} times {float(expected[first]):.4g}"
            )
            words = f"times {float(found[first]):.4g}, in {step.names[first]}"
            return CheckResult("clipping", name, judged(False), wanted, words, file)
    limit = steps[0].training.clip_norm
    expected = f"to at most {limit:g}" if limit else "not at all"
    return CheckResult("clipping", name, judged(True), expected, "so", file)


def _check_optimizer(steps: list[FlatStep], updates: list[Update], file: str) -> Iterator[CheckResult]:
    """Check the learning rate that was applied, and then Adam's step apart from it."""
    name, moments = "Adam's moments are the textbook's", list[str]()
    for step, update in zip(steps, updates, strict=True):
        moments += _moments_off(step, update)
    expected = "averages of the clipped gradient and of its square"
    yield CheckResult("optimizer", name, judged(not moments), expected, moments[0] if moments else "so", file)
    if moments:
        return
    rates, off = [], list[str]()
    for step, update in zip(steps, updates, strict=True):
        ratio = _rate_ratio(step, update)
        rates.append((abs(ratio - 1), step.number, update.learning_rate, ratio * update.learning_rate))
        off += _weights_off(step, update, ratio if rates[-1][0] > RATE_BOUND else 1.0)
    worst, number, rate, found = max(rates)
    name, wanted = "weights move by the learning rate asked for", f"{rate:.4g} in step {number}"
    yield CheckResult("optimizer", name, judged(worst < RATE_BOUND), wanted, f"{found:.4g}", file)
    name, expected = "Adam moves every weight as the textbook's", "moment / (root of the second moment + 1e-8)"
    yield CheckResult("optimizer", name, judged(not off), expected, off[0] if off else "so", file)


def _rate_ratio(step: FlatStep, update: Update) -> float:
    """Return how many times the textbook's step the weights went: the median of parameters, where float32 shows it."""
    before = step.before["model"]
    way, found = update.after["model"] - before, step.after["model"] - before
    way = torch.where(way.abs() > 100 * FLOAT32 * before.abs(), way, 0.0)
    size = step.sums(way.square())
    ratios = (step.sums(found * way) / size)[size > 0].sort().values
    return float(ratios[len(ratios) // 2]) if len(ratios) else 1.0


def _moments_off(step: FlatStep, update: Update) -> list[str]:
    for moment, share in (("exp_avg", 0.1), ("exp_avg_sq", 1 - step.training.adam_beta2)):
        expected, kept = update.after[moment], (1 - share) * step.before[moment]
        parts = step.lengths(kept) + step.lengths(expected - kept)  # which may cancel
        off = step.lengths(step.after[moment] - expected) / parts.clamp(min=1e-30)
        wrong = ~(off <= MOMENT_BOUND + update.rounding)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            return [f"{moment} of {step.names[first]} {float(off[first]):.1e} off after step {step.number}"]
    return []


def _weights_off(step: FlatStep, update: Update, ratio: float) -> list[str]:
    before, found = step.before["model"], step.after["model"]
    expected = before + ratio * (update.after["model"] - before)
    bound = 2 * FLOAT32 * before.abs() + (UPDATE_BOUND + update.rounding) * abs(ratio) * update.learning_rate
    off = (found - expected).abs()
    first = step.first_of(~(off <= bound))
    if first is None:
        return []
    name, own = first
    rates = float(off[own].max()) / update.learning_rate
    moved = "moves otherwise" if bool((found != before)[own].any()) else "does not move"
    return [f"{name} {moved} in step {step.number}, by up to {rates:.2g} of the learning rate"]


def _decay(before: Tensor, ema: Tensor, weights: Tensor) -> float:
    """Return the decay that an average moved by."""
    way, room = ema - before, weights - before
    return 1 - float((way * room).sum() / room.square().sum().clamp(min=1e-30))


def _check_ema(steps: list[FlatStep], updates: list[Update], file: str) -> CheckResult:
    name, decays = "the average of the weights follows, early and late in a run", []
    for step, update in zip(steps, updates, strict=True):
        before, expected, ours, weights = (
            step.before["ema"],
            update.after["ema"],
            step.after["ema"],
            step.after["model"],
        )
        decays.append(f"{_decay(before, expected, weights):.6g}")
        bound = 2 * FLOAT32 * (expected.abs() + weights.abs() + before.abs())
        first = step.first_of(~((ours - expected).abs() <= bound))
        if first is not None:
            parameter, own = first
            words = f"{_decay(before, ours, weights):.6g}, and {_decay(before[own], ours[own], weights[own]):.6g}"
            wanted = f"a decay of {decays[-1]} in step {step.number}"
            return CheckResult("ema", name, judged(False), wanted, f"{words} for {parameter}", file)
    return CheckResult("ema", name, judged(True), f"decays of {', '.join(decays)}", "so", file)
