"""Is what a step does with its gradient the textbook's: clipping, Adam, the learning rate, the moving average?

The textbook's own `train` takes each step again, from the engine's recorded gradient, weights, moments and average: its
network is one whose gradient is given.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddpm_fast import textbook
from ddpm_fast.checks.recording import State, TrainingStep, distance
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


class GivenGradients(torch.autograd.Function):
    """Something to differentiate whose gradients by the parameters are known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return x * 0

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *ctx.gradients


class Weights(nn.Module):
    """A network of which only its weights and their gradients matter."""

    def __init__(self, weights: dict[str, Tensor], gradients: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight.double()) for weight in weights.values()])
        self.gradients = gradients

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return GivenGradients.apply(x, self.gradients, *self.weights)  # pyright: ignore[reportReturnType]


class NoNoise:
    """Random numbers for a batch of which nothing matters."""

    def randint(self, high: int, shape: tuple[int]) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    def randn(self, shape: torch.Size) -> Tensor:
        return torch.zeros(shape)


@dataclass
class Update:
    """What the textbook makes of a recorded step's gradient."""

    length: float
    """Of the gradient, all parameters together, before it is clipped."""
    clipped: dict[str, Tensor] = field(default_factory=dict)
    learning_rate: float = 0.0
    after: State = field(default_factory=dict)
    """As `recording.State`, in float64."""

    @property
    def rounding(self) -> float:
        """Return how far clipped gradients may differ: PyTorch divides by the length plus 1e-6, the engine by it."""
        return 4e-6 / max(self.length, 1e-30)


def textbook_update(step: TrainingStep, gradients: dict[str, Tensor], clip: bool = True) -> Update:
    """Let the textbook clip, take Adam's step from the engine's moments, and move the average.

    The average follows the engine's own new weights, so that a wrong update does not show in it as well.
    """
    names = list(gradients)
    update = Update(length=sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5)
    unet = Weights({name: step.before["model"][name] for name in names}, [gradients[name] for name in names])
    ema = Weights({name: step.before["ema"][name] for name in names}, [])
    clip_norm = step.config.training.clip_norm if clip else 0.0
    training = replace(step.config.training, clip_norm=clip_norm, min_snr_gamma=0.0)
    config = Config(unet=UNetConfig(), diffusion=DiffusionConfig(), data=DataConfig(), training=training)

    def before(optimizer: Any, *_: Any) -> None:
        update.learning_rate = optimizer.param_groups[0]["lr"]
        for name, weight in zip(names, unet.weights, strict=True):
            assert weight.grad is not None
            update.clipped[name] = weight.grad.clone()
            if step.updates:
                moments = {moment: step.before[moment][name].double() for moment in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": torch.tensor(float(step.updates)), **moments}

    @torch.no_grad()
    def after(optimizer: Any, *_: Any) -> None:
        update.after["model"] = {n: w.detach().clone() for n, w in zip(names, unet.weights, strict=True)}
        for moment in ("exp_avg", "exp_avg_sq"):
            update.after[moment] = {n: optimizer.state[w][moment] for n, w in zip(names, unet.weights, strict=True)}
        for name, weight in zip(names, unet.weights, strict=True):
            weight.copy_(step.after["model"][name])

    with ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(before).remove)
        stack.callback(register_optimizer_step_post_hook(after).remove)
        next(textbook.train(unet, ema, [(step.number, torch.zeros(1, 1, 1, 1))], config, NoNoise()))
    update.after["ema"] = dict(zip(names, (average.detach() for average in ema.weights), strict=True))
    return update


def check_updates(steps: list[TrainingStep], fused: bool) -> Iterator[CheckResult]:
    """Check clipping, Adam's step with its learning rate, and the average of every recorded step."""
    file = f"{'kernels/adam_ema.py' if fused else 'ddpm_fast/ops/reference.py'}, {ENGINE}"
    gradients = [{name: gradient.double() for name, gradient in step.gradients.items()} for step in steps]
    updates = [textbook_update(step, gradient) for step, gradient in zip(steps, gradients, strict=True)]
    clipping = _check_clipping(steps, gradients, updates, file)
    yield clipping
    if not clipping.passed:  # then Adam is checked with what the engine made of its gradient
        clipped = [{name: _added_to_moment(step, name) / 0.1 for name in step.gradients} for step in steps]
        updates = [textbook_update(step, gradient, clip=False) for step, gradient in zip(steps, clipped, strict=True)]
    yield from _check_optimizer(steps, updates, file)
    yield _check_ema(steps, updates, file)


def _added_to_moment(step: TrainingStep, name: str) -> Tensor:
    """Return what Adam added to its first moment: 0.1 times the gradient that it saw."""
    return step.after["exp_avg"][name].double() - 0.9 * step.before["exp_avg"][name].double()


def _scale(step: TrainingStep, gradient: Tensor, name: str) -> float | None:
    """Return what Adam's first moment says a gradient was scaled by, or nothing if that is not what became of it."""
    added = _added_to_moment(step, name)
    scale = float((added * gradient).sum() / gradient.square().sum() / 0.1) if gradient.any() else 0.0
    return scale if scale > 0 and distance(added, 0.1 * scale * gradient) < CLIP_BOUND else None


def _square_scale(step: TrainingStep, gradient: Tensor, name: str) -> float:
    """Return what Adam's second moment says that it was scaled by, squared."""
    added = step.after["exp_avg_sq"][name].double() - 0.999 * step.before["exp_avg_sq"][name].double()
    squares = gradient.square()
    return float((added * squares).sum() / squares.square().sum() / 0.001)


def _check_clipping(
    steps: list[TrainingStep], gradients: list[dict[str, Tensor]], updates: list[Update], file: str
) -> CheckResult:
    """Check by how much gradients were scaled; both of Adam's moments must say so, else it is not the clipping."""
    name = "the gradient is clipped to its norm, all parameters together"
    for step, by_name, update in zip(steps, gradients, updates, strict=True):
        for parameter, gradient in by_name.items():
            found = _scale(step, gradient, parameter)
            if found is None:
                continue
            expected = float(update.clipped[parameter].norm() / gradient.norm())
            agree = abs(_square_scale(step, gradient, parameter) - found**2) < 0.05 * found**2
            if abs(found - expected) > (CLIP_BOUND + update.rounding) * expected and agree:
                wanted = f"a gradient of length {update.length:.3g} in step {step.number} times {expected:.4g}"
                words = f"times {found:.4g}, in {parameter}"
                return CheckResult("clipping", name, judged(False), wanted, words, file)
    limit = steps[0].config.training.clip_norm
    expected = f"to at most {limit:g}" if limit else "not at all"
    return CheckResult("clipping", name, judged(True), expected, "so", file)


def _check_optimizer(steps: list[TrainingStep], updates: list[Update], file: str) -> Iterator[CheckResult]:
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


def _rate_ratio(step: TrainingStep, update: Update) -> float:
    """Return how many times the textbook's step the weights went: the median of parameters, where float32 shows it."""
    ratios = []
    for name, expected in update.after["model"].items():
        before = step.before["model"][name].double()
        way, found = expected - before, step.after["model"][name].double() - before
        shown = way.abs() > 100 * FLOAT32 * before.abs()
        if shown.any():
            ratios.append(float((found * way)[shown].sum() / way[shown].square().sum()))
    return sorted(ratios)[len(ratios) // 2] if ratios else 1.0


def _moments_off(step: TrainingStep, update: Update) -> list[str]:
    for moment, share in (("exp_avg", 0.1), ("exp_avg_sq", 0.001)):
        for name, expected in update.after[moment].items():
            found, kept = step.after[moment][name].double(), (1 - share) * step.before[moment][name].double()
            parts = float(kept.norm() + (expected - kept).norm())  # which may cancel
            off = float((found - expected).norm()) / max(parts, 1e-30)
            if not off <= MOMENT_BOUND + update.rounding:
                return [f"{moment} of {name} {off:.1e} off after step {step.number}"]
    return []


def _weights_off(step: TrainingStep, update: Update, ratio: float) -> list[str]:
    for name, expected in update.after["model"].items():
        before, found = (state["model"][name].double() for state in (step.before, step.after))
        expected = before + ratio * (expected - before)
        bound = 2 * FLOAT32 * before.abs() + (UPDATE_BOUND + update.rounding) * abs(ratio) * update.learning_rate
        off = (found - expected).abs()
        if bool((~(off <= bound)).any()):
            rates = float(off.max()) / update.learning_rate
            moved = "moves otherwise" if bool((found != before).any()) else "does not move"
            return [f"{name} {moved} in step {step.number}, by up to {rates:.2g} of the learning rate"]
    return []


def _decay(before: State, ema: dict[str, Tensor], weights: dict[str, Tensor]) -> float:
    """Return the decay that an average moved by, over all parameters."""
    names = list(ema)
    way = [(ema[name].double() - before["ema"][name].double()).flatten() for name in names]
    room = [(weights[name].double() - before["ema"][name].double()).flatten() for name in names]
    a, b = torch.cat(way), torch.cat(room)
    return 1 - float((a * b).sum() / b.square().sum().clamp(min=1e-30))


def _check_ema(steps: list[TrainingStep], updates: list[Update], file: str) -> CheckResult:
    name, decays = "the average of the weights follows, early and late in a run", []
    for step, update in zip(steps, updates, strict=True):
        expected = update.after["ema"]
        decays.append(f"{_decay(step.before, expected, step.after['model']):.6g}")
        for parameter, average in expected.items():
            ours, weight = (step.after[part][parameter].double() for part in ("ema", "model"))
            bound = 2 * FLOAT32 * (average.abs() + weight.abs() + step.before["ema"][parameter].abs())
            if bool((~((ours - average).abs() <= bound)).any()):
                found = {n: step.after["ema"][n] for n in expected}
                all_of_them, own = (
                    _decay(step.before, part, step.after["model"]) for part in (found, {parameter: ours})
                )
                words = f"{all_of_them:.6g}, and {own:.6g} for {parameter}"
                wanted = f"a decay of {decays[-1]} in step {step.number}"
                return CheckResult("ema", name, judged(False), wanted, words, file)
    return CheckResult("ema", name, judged(True), f"decays of {', '.join(decays)}", "so", file)
