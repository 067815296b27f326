"""kernels/adam_ema.py, and its reference, against Adam's formula in float64 and against PyTorch's own optimizer.

Shapes: P weights, K steps.
"""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ddpm_fast.constants import STEP_FIGURE, STEP_NUMBER
from ddpm_fast.ops import reference

pytest.importorskip("triton")
from ddpm_fast.kernels import adam_ema as module
from ddpm_fast.kernels.adam_ema import BLOCK, PARTIALS, SQUARES, adam_ema

OPTIONS: dict[str, Any] = {"learning_rate": 0.5, "warmup_steps": 3, "steps": 10**7, "cooldown_steps": 0}
OPTIONS |= {"beta2": 0.999, "clip_norm": 1.5, "ema_decay": 0.9}
FORMS = {"kernel": adam_ema, "reference": reference.adam_ema}


class State(NamedTuple):
    """What an update moves."""

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor
    low_precision: Tensor | None
    numbers: Tensor
    figures: Tensor


def take_step(form: str, state: State, gradient: Tensor, loss: Tensor, options: dict[str, Any] = OPTIONS) -> None:
    moved, (low_precision, numbers, figures) = state[:4], state[4:]
    FORMS[form](*moved, gradient.clone(), loss, numbers, figures, low_precision, **options)


def normal(P: int, seed: int, device: str) -> Tensor:
    return torch.randn(P, generator=torch.Generator().manual_seed(seed)).to(device)


def start(P: int, device: str, low_precision: torch.dtype | None = None, step: int = 0, updates: int = 0) -> State:
    """Return weights before a step, with moments as they are after so many updates."""
    exp_avg, exp_avg_sq = normal(P, 1, device), normal(P, 2, device).square()
    moments = (exp_avg, exp_avg_sq) if updates else (torch.zeros_like(exp_avg), torch.zeros_like(exp_avg))
    low = None if low_precision is None else torch.full((P,), torch.nan, dtype=low_precision, device=device)
    numbers, figures = torch.tensor([step, updates, -1, 2]), torch.tensor([torch.nan, torch.nan, 7.0])
    return State(normal(P, 3, device), *moments, normal(P, 4, device), low, numbers.to(device), figures.to(device))


def rate_at(step: int, options: dict[str, Any]) -> float:
    rise, left, falling = (
        (step + 1) / max(options["warmup_steps"], 1),
        options["steps"] - step,
        options["cooldown_steps"],
    )
    return options["learning_rate"] * min(1, rise) * (min(1, left / falling) if falling else 1)


def formula(state: State, gradient: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Return weights, moments and average after a step, by Kingma and Ba's Algorithm 1 in float64."""
    w, m, v, ema = (value.double() for value in state[:4])
    step, n, g = int(state.numbers[STEP_NUMBER.step]), int(state.numbers[STEP_NUMBER.updates]) + 1, gradient.double()
    norm = float(g.square().sum()) ** 0.5
    if options["clip_norm"]:
        g = g * min(1, options["clip_norm"] / norm)
    beta2 = options["beta2"]
    m, v = 0.9 * m + (1 - 0.9) * g, beta2 * v + (1 - beta2) * g**2
    w = w - rate_at(step, options) * (m / (1 - 0.9**n)) / ((v / (1 - beta2**n)).sqrt() + 1e-8)
    decay = min(options["ema_decay"], (1 + step) / (10 + step))
    return [w, m, v, decay * ema + (1 - decay) * w]


def derive(truth: list[Tensor], state: State, options: dict[str, Any]) -> list[Tensor]:
    """Return how far float32 may be off, to first order in u = 2**-24: by element, for weights, moments and average.

    The clipped gradient is off by the norm's square root and quotient and a sum of squares in which no number passes
    more than 32 additions at these sizes: 40 u. A moment adds two products to that. A step is a quotient of moments
    and a square root, with scalars of some roundings each: 64 u of itself, and more of the weight that it is added to.
    """
    u = 2.0**-24
    w, m, v, ema = truth
    step = (w - state.weights.double()).abs()
    moments = [44 * u * (m.abs() + state.exp_avg.double().abs()), 90 * u * v]
    # Where m is a difference that cancels, the step's error is that of m by the size of its terms.
    lr, beta2 = options["learning_rate"], options["beta2"]
    n = int(state.numbers[STEP_NUMBER.updates]) + 1
    slope = lr / (1 - 0.9**n) / ((v / (1 - beta2**n)).sqrt() + 1e-8)
    weights = 128 * u * step + 2 * u * (w.abs() + step) + slope * moments[0]
    return [weights, *moments, weights + 4 * u * (ema.abs() + w.abs() + state.ema.double().abs())]


def check(P: int, device: str, form: str = "kernel", dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    low = changes.pop("low_precision", None)
    where = {name: changes.pop(name) for name in ("step", "updates") if name in changes}
    state, options, gradient = start(P, device, low, **where), OPTIONS | changes, normal(P, 5, device).to(dtype)
    before = copy.deepcopy(state)
    truth = formula(before, gradient, options)
    take_step(form, state, gradient, torch.tensor(0.25, device=device), options)
    bounds = derive(truth, before, options)
    for name, found, exact, bound in zip(State._fields, state, truth, bounds, strict=False):
        assert found is not None
        assert ((found.double() - exact).abs() <= bound).all(), name
    if low is not None:
        assert state.low_precision is not None
        ulp = torch.finfo(low).eps * (1 if device == "cpu" else 0.5)  # the interpreter cuts off where a GPU rounds
        assert ((state.low_precision.double() - state.weights.double()).abs() <= ulp * state.weights.abs()).all()
    step, updates, _, loss_steps = before.numbers.tolist()
    assert state.numbers.tolist() == [step, updates + 1, -1, loss_steps + 1]
    rate = rate_at(step, options)
    assert state.figures.tolist() == pytest.approx([rate, float(gradient.double().norm()), 7.25], rel=1e-6)


SIZES = [1, 63, BLOCK.value - 1, BLOCK.value + 1, SQUARES.value + 31]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("P", SIZES)
def test_a_step_is_adams(P, form, device):
    check(P, device, form)
    check(P, device, form, step=20, updates=11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [0, 2, 80, 10**6])
@pytest.mark.parametrize(
    "change", [{"clip_norm": 0.0}, {"clip_norm": 1e3}, {"warmup_steps": 0}, {"warmup_steps": 1}, {"ema_decay": 0.9999}]
)
def test_clipping_warm_up_and_decay(change, step, form, device):
    check(77, device, form, step=step, updates=step, **change)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beta2", [0.5, 0.95, 0.99, 0.9999])
@pytest.mark.parametrize(("step", "cooldown_steps"), [(0, 1), (1, 2), (39, 20), (40, 20), (41, 20), (59, 20), (7, 60)])
def test_cooldown_and_another_beta2(step, cooldown_steps, beta2, form, device):
    """On the plateau, and at the first, a middle and the last step of cooldowns, one of which meets the warm-up."""
    check(77, device, form, step=step, updates=step, steps=max(60, step), cooldown_steps=cooldown_steps, beta2=beta2)
    check(77, device, form, step=step, updates=step, steps=step + 1, cooldown_steps=cooldown_steps, beta2=beta2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_copy_in_low_precision_and_a_gradient_in_it(dtype, form, device):
    check(130, device, form, low_precision=dtype)
    if form == "kernel":
        check(130, device, form, dtype=dtype)


def test_any_size(draw, device):
    check(draw.randint(1, 2000), device, step=draw.randint(0, 50), updates=draw.randint(0, 50))


@pytest.mark.parametrize("partials", [1, PARTIALS.value - 1, PARTIALS.value + 1, 3 * PARTIALS.value])
def test_the_norm_is_taken_over_all_programs(partials, device):
    """Four million weights have more programs than are added at once: here their sums are made up."""
    sums = torch.rand(partials, generator=torch.Generator().manual_seed(partials)).to(device)
    state, scalars = start(1, device), torch.full((module.SCALARS,), torch.nan, device=device)
    tensors = {"partial_ptr": sums, "scalars_ptr": scalars, "loss_ptr": torch.zeros((), device=device)}
    tensors |= {"numbers_ptr": state.numbers, "figures_ptr": state.figures}
    settings: dict[str, Any] = {"learning_rate": 0.1, "warmup_steps": 1, "steps": 1, "cooldown_steps": 0}
    settings |= {"log_beta2": -0.001, "clip_norm": 0.0, "least_follow": 0.1}
    module.adam_scalars_kernel[(1,)](**tensors, partials=partials, **settings)
    expected = float(sums.double().sum()) ** 0.5
    assert float(state.figures[STEP_FIGURE.gradient_norm]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("clip_norm", "beta2"), [(0.0, 0.999), (8.0, 0.95)])
def test_ten_steps_are_those_of_torchs_optimizer(clip_norm, beta2, form, device):
    """With gradients that change in size and sign, in float64 there."""
    P, options = 100, OPTIONS | {"clip_norm": clip_norm, "beta2": beta2, "steps": 10, "cooldown_steps": 4}
    state = start(P, device)
    weights = state.weights.double().requires_grad_()
    optimizer, ema = torch.optim.Adam([weights], betas=(0.9, beta2)), state.ema.double()
    for step in range(10):
        gradient = normal(P, 10 + step, device) * (0.1 + step % 3)
        weights.grad = gradient.double()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_([weights], clip_norm)
        optimizer.param_groups[0]["lr"] = 0.5 * min(1, (step + 1) / 3, (10 - step) / 4)
        optimizer.step()
        ema.lerp_(weights.detach(), 1 - min(0.9, (1 + step) / (10 + step)))
        state.numbers[STEP_NUMBER.step] = step
        take_step(form, state, gradient, torch.tensor(0.25, device=device), options)
        torch.testing.assert_close(state.weights.double(), weights.detach(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(state.ema.double(), ema, rtol=2e-6, atol=2e-6)
    assert float(state.figures[STEP_FIGURE.loss_sum]) == 7 + 10 * 0.25


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_from_the_first_step_that_is_not_finite_nothing_moves(where, value, form, device):
    state, loss = start(90, device, torch.bfloat16, step=5, updates=5), torch.tensor(0.25, device=device)
    good, bad = normal(90, 5, device), {"gradient": normal(90, 5, device), "loss": loss.clone()}
    take_step(form, state, good, loss)
    before = copy.deepcopy(state)
    bad[where].view(-1)[-1] = value
    broken = bad["gradient"], bad["loss"]
    for step, (gradient, given_loss) in enumerate([broken, (good, loss), broken], 6):
        state.numbers[STEP_NUMBER.step] = step
        take_step(form, state, gradient, given_loss)
        for name, now, then in zip(State._fields[:5], state, before, strict=False):
            assert now is not None and then is not None  # noqa: PT018
            assert torch.equal(now, then), name
        assert state.numbers.tolist() == [step, 6, 6, 3]
        assert float(state.figures[STEP_FIGURE.loss_sum]) == 7.25


def test_a_gradient_whose_square_overflows_stops_as_well(device):
    state, gradient = start(8, device), torch.full((8,), 1e30, device=device)
    take_step("kernel", state, gradient, torch.tensor(0.25, device=device))
    assert int(state.numbers[STEP_NUMBER.bad_step]) == 0


def test_the_norm_of_millions_of_numbers_is_right(device):
    """PyTorch's own of as many is 1e-4 short on a CPU."""
    state, gradient = start(4_000_000, device), normal(4_000_000, 0, device)
    take_step("reference", state, gradient, torch.zeros((), device=device))
    assert float(state.figures[STEP_FIGURE.gradient_norm]) == pytest.approx(float(gradient.double().norm()), rel=1e-6)
