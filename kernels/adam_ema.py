"""adam_ema: Adam's step with a clipped gradient, and the weights' moving average, in one pass over memory.

g = gradient / max(|gradient| / clip_norm, 1);  m = beta1*m + (1 - beta1)*g;  v = beta2*v + (1 - beta2)*g^2;
w = w - lr * (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps);  ema = ema + (1 - decay)*(w - ema)
(Kingma and Ba 2015, Algorithm 1, with the eps where PyTorch has it; the average of Ho et al. 2020, Appendix B).

Three launches: the sum of the gradient's squares, by programs; what is one number for all, by one program; then every
weight. So nothing of a step waits for the host, and a step that is not finite moves nothing.
Layout: all parameters side by side. Arithmetic in float32, the powers of the betas in float64. Bytes moved of each
weight, with a gradient in float32: 4 for the norm; then 20 read and 16 written, and 2 more for a copy in 16 bits.
Deterministic: sums in a fixed order, without atomics. Not yet timed on a GPU.
Shapes: P weights, B blocks of the gradient.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.constants import ADAM_BETA1, ADAM_EPS, STEP_FIGURE, STEP_NUMBER
from ddpm_fast.kernels import checks

BETA1 = tl.constexpr(ADAM_BETA1)
LOG_BETA1 = tl.constexpr(math.log(ADAM_BETA1))
EPS = tl.constexpr(ADAM_EPS)

STEP = tl.constexpr(STEP_NUMBER.step)
UPDATES = tl.constexpr(STEP_NUMBER.updates)
BAD_STEP = tl.constexpr(STEP_NUMBER.bad_step)
LOSS_STEPS = tl.constexpr(STEP_NUMBER.loss_steps)
LEARNING_RATE = tl.constexpr(STEP_FIGURE.learning_rate)
GRADIENT_NORM = tl.constexpr(STEP_FIGURE.gradient_norm)
LOSS_SUM = tl.constexpr(STEP_FIGURE.loss_sum)

# What the second launch tells the third.
MOVES = tl.constexpr(0)  # 1, or 0 where nothing may move
CLIP = tl.constexpr(1)  # what gradients are multiplied by
STEP_SIZE = tl.constexpr(2)  # lr / (1 - beta1^n)
ROOT_SCALE = tl.constexpr(3)  # 1 / sqrt(1 - beta2^n)
FOLLOW = tl.constexpr(4)  # 1 - decay
SCALARS = 5

SQUARES = tl.constexpr(4096)  # added by a program
PARTIALS = tl.constexpr(1024)  # sums of such, added at once
BLOCK = tl.constexpr(1024)  # weights of a program: 8 per thread, so that vectors of 16-bit numbers have 16 bytes


@triton.jit
def adam_norm_kernel(
    partial_ptr,  # [B] float32: sums of squares
    gradient_ptr,  # [P]
    P,
):
    place = tl.program_id(0).to(tl.int64) * SQUARES + tl.arange(0, SQUARES)
    gradient = tl.load(gradient_ptr + place, mask=place < P, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(gradient * gradient))


@triton.jit
def adam_scalars_kernel(
    scalars_ptr,  # [5] float32, written
    numbers_ptr,  # [4] int64, read and written
    figures_ptr,  # [3] float32, read and written
    partial_ptr,  # [B] float32
    loss_ptr,  # [] float32
    partials,  # B
    learning_rate,
    warmup_steps,  # 1 or more
    steps,
    cooldown_steps,  # 0 for none
    log_beta2,
    clip_norm,  # 0 for none
    least_follow,  # 1 - the largest decay
):
    squares = tl.zeros((PARTIALS,), tl.float32)
    for first in range(0, partials, PARTIALS):
        block = first + tl.arange(0, PARTIALS)
        squares += tl.load(partial_ptr + block, mask=block < partials, other=0.0)
    norm = tl.sqrt(tl.sum(squares))
    loss = tl.load(loss_ptr)
    step = tl.load(numbers_ptr + STEP)
    bad_step = tl.load(numbers_ptr + BAD_STEP)
    finite = (norm < float("inf")) & (tl.abs(loss) < float("inf"))  # neither is true of NaN
    bad_step = tl.where((bad_step >= 0) | finite, bad_step, step)
    moves = bad_step < 0

    updates = tl.load(numbers_ptr + UPDATES) + moves.to(tl.int64)
    tl.store(numbers_ptr + UPDATES, updates)
    tl.store(numbers_ptr + BAD_STEP, bad_step)
    tl.store(numbers_ptr + LOSS_STEPS, tl.load(numbers_ptr + LOSS_STEPS) + moves.to(tl.int64))

    rise = tl.minimum((step + 1).to(tl.float32) / warmup_steps, 1.0)
    fall = tl.where(cooldown_steps > 0, tl.minimum((steps - step).to(tl.float32) / cooldown_steps, 1.0), 1.0)
    rate = learning_rate * rise * fall
    tl.store(figures_ptr + LEARNING_RATE, rate)
    tl.store(figures_ptr + GRADIENT_NORM, norm)
    tl.store(figures_ptr + LOSS_SUM, tl.load(figures_ptr + LOSS_SUM) + tl.where(moves, loss, 0.0))

    # In float64: 1 - beta2 is 1e-3 or so, and float32 would leave the first steps four digits.
    n = updates.to(tl.float64)
    step_size = rate / (1.0 - tl.exp(n * LOG_BETA1))
    root_scale = 1.0 / tl.sqrt(1.0 - tl.exp(n * log_beta2))
    tl.store(scalars_ptr + MOVES, moves.to(tl.float32))
    tl.store(scalars_ptr + CLIP, tl.where(clip_norm > 0, tl.minimum(clip_norm / norm, 1.0), 1.0))
    tl.store(scalars_ptr + STEP_SIZE, step_size.to(tl.float32))
    tl.store(scalars_ptr + ROOT_SCALE, root_scale.to(tl.float32))
    tl.store(scalars_ptr + FOLLOW, tl.maximum(9.0 / (step + 10).to(tl.float32), least_follow))


@triton.jit
def adam_ema_kernel(
    weights_ptr,  # [P] float32, read and written; so are the next three
    exp_avg_ptr,
    exp_avg_sq_ptr,
    ema_ptr,
    gradient_ptr,  # [P]
    scalars_ptr,  # [5] float32
    low_precision_ptr,  # [P], written, or None
    P,
    beta2_rest,  # 1 - beta2
):
    if tl.load(scalars_ptr + MOVES) == 0:
        return
    clip = tl.load(scalars_ptr + CLIP)
    step_size = tl.load(scalars_ptr + STEP_SIZE)
    root_scale = tl.load(scalars_ptr + ROOT_SCALE)
    follow = tl.load(scalars_ptr + FOLLOW)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < P
    gradient = clip * tl.load(gradient_ptr + place, mask=real, other=0.0).to(tl.float32)
    exp_avg = BETA1 * tl.load(exp_avg_ptr + place, mask=real, other=0.0) + (1 - BETA1) * gradient
    exp_avg_sq = tl.load(exp_avg_sq_ptr + place, mask=real, other=0.0)
    exp_avg_sq = (1 - beta2_rest) * exp_avg_sq + beta2_rest * gradient * gradient
    weights = tl.load(weights_ptr + place, mask=real, other=0.0)
    weights -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) * root_scale + EPS)
    ema = tl.load(ema_ptr + place, mask=real, other=0.0)
    ema += follow * (weights - ema)
    # A thread may load other places than it stores: wait until all have loaded what others will store.
    tl.debug_barrier()
    tl.store(weights_ptr + place, weights, mask=real)
    tl.store(exp_avg_ptr + place, exp_avg, mask=real)
    tl.store(exp_avg_sq_ptr + place, exp_avg_sq, mask=real)
    tl.store(ema_ptr + place, ema, mask=real)
    if low_precision_ptr is not None:
        tl.store(low_precision_ptr + place, weights, mask=real)


def adam_ema(
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    gradient: Tensor,
    loss: Tensor,
    numbers: Tensor,
    figures: Tensor,
    low_precision: Tensor | None,
    *,
    learning_rate: float,
    warmup_steps: int,
    steps: int,
    cooldown_steps: int,
    beta2: float,
    clip_norm: float,
    ema_decay: float,
) -> None:
    """Update the weights in place; arguments as `ddpm_fast.ops.reference.adam_ema`, the gradient left as it is.

    Raises:
        ValueError: a shape, dtype, device or layout is not taken.
    """
    checks.check_device("weights", weights)
    device, P = weights.device, weights.numel()
    state = {"weights": weights, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    for name, value in state.items():
        checks.check_dense(name, value, (P,), (torch.float32,), device)
    checks.check_dense("gradient", gradient, (P,), checks.FLOATS, device)
    checks.check_dense("loss", loss, (), (torch.float32,), device)
    checks.check_dense("numbers", numbers, (len(STEP_NUMBER),), (torch.int64,), device)
    checks.check_dense("figures", figures, (len(STEP_FIGURE),), (torch.float32,), device)
    if low_precision is not None:
        checks.check_dense("low_precision", low_precision, (P,), checks.FLOATS, device)
    partials = triton.cdiv(P, SQUARES.value)
    partial, scalars = (torch.empty(count, dtype=torch.float32, device=device) for count in (partials, SCALARS))
    with torch.cuda.device_of(weights):
        adam_norm_kernel[(partials,)](partial_ptr=partial, gradient_ptr=gradient, P=P)
        adam_scalars_kernel[(1,)](
            scalars_ptr=scalars,
            numbers_ptr=numbers,
            figures_ptr=figures,
            partial_ptr=partial,
            loss_ptr=loss,
            partials=partials,
            learning_rate=learning_rate,
            warmup_steps=max(warmup_steps, 1),
            steps=steps,
            cooldown_steps=cooldown_steps,
            log_beta2=math.log(beta2),
            clip_norm=clip_norm,
            least_follow=1 - ema_decay,
        )
        adam_ema_kernel[checks.grid("weights", weights, triton.cdiv(P, BLOCK.value))](
            **{f"{name}_ptr": value for name, value in state.items()},
            gradient_ptr=gradient,
            scalars_ptr=scalars,
            low_precision_ptr=low_precision,
            P=P,
            beta2_rest=1 - beta2,
        )
