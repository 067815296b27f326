"""The six ops of the engine in plain PyTorch: what they mean, readable next to the paper.

The Triton kernels compute the same; `ddpm_fast.ops` chooses between them. Arithmetic is float32, or float64
where tables or inputs are float64: then these functions are the truth that tests compare with.
Images may have any memory layout, where kernels take NHWC: shapes are written N, C, H, W whatever the strides. T
timesteps, K sampling steps, G groups, P numbers in all parameters together. What changes from call to call (key,
sample_index, step) is a device tensor, so that a captured graph can be replayed with other values.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.constants import (
    ADAM_BETA1,
    ADAM_EPS,
    GROUP_NORM_EPS,
    Row,
    StepFigures,
    StepNumbers,
    Stream,
    TrainingTable,
    drop_threshold,
)
from ddpm_fast.diffusion.noise import NoiseAddress, normal, random_flips, random_words_below
from ddpm_fast.ops.cpu_group_norm import group_norm


class Dropout(NamedTuple):
    """Addressable dropout: which activations fall is a function of the address alone."""

    probability: float
    key: Tensor  # [2] int64 words of the seed
    sample_index: Tensor  # [N] int64 numbers of the training examples
    layer: int  # number of the layer in forward order, else every block would drop the same places


def _normalize(images: Tensor, address: NoiseAddress, flip: bool, dtype: torch.dtype) -> Tensor:
    """Return x_start: images in [-1, 1], mirrored where the address says so."""
    x_start = images.to(dtype) / 127.5 - 1 if images.dtype == torch.uint8 else images.to(dtype)
    return torch.where(random_flips(address).view(-1, 1, 1, 1), x_start.flip(-1), x_start) if flip else x_start


def _example(
    images: Tensor, t: Tensor, table: Tensor, key: Tensor, sample_index: Tensor, flip: bool
) -> tuple[TrainingTable[Tensor], Tensor, Tensor]:
    """Return what training examples are made of: their rows of the table [N, 1, 1, 1], x_start and eps."""
    address, shape = NoiseAddress(key, sample_index), (images.shape[1], images.shape[2], images.shape[3])
    compute = torch.promote_types(table.dtype, torch.float32)
    row = TrainingTable(*table[t].view(-1, len(TrainingTable._fields), 1, 1, 1).unbind(1))
    return row, _normalize(images, address, flip, compute), normal(address, 0, Stream.TRAINING, shape, compute)


def q_sample(
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    *,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Diffuse images to timestep t: x_t = signal * x_start + noise * eps (Ho et al. 2020, Eq. 4).

    Args:
        images: [N, C, H, W] uint8 in 0..255 (mapped to [-1, 1]), or floats taken as they are.
        t: [N] int64 in 0..T-1.
        table: [T, 5], see `schedule.training_table`; its dtype is the dtype of the arithmetic.
        key: [2] int64 words of the seed.
        sample_index: [N] int64 numbers of the training examples, the noise's address.
        flip: mirror each image left to right with probability 1/2.
        dtype: of the result.

    Returns:
        [N, C, H, W] in `dtype`, laid out as NHWC, on which convolutions run faster.
    """
    row, x_start, eps = _example(images, t, table, key, sample_index, flip)
    return (row.signal * x_start + row.noise * eps).to(dtype, memory_format=torch.channels_last)


def noise_mse(
    prediction: Tensor,
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    *,
    flip: bool = False,
) -> Tensor:
    """Compare a prediction with its target, made again from the noise's address (Ho et al. 2020, Eq. 14).

    Args:
        prediction: [N, C, H, W], what the U-Net returned for `q_sample` of the same arguments.
        images, t, table, key, sample_index, flip: as for `q_sample`.

    Returns:
        [N] weight * mean((prediction - (target_eps * eps + target_x_start * x_start))**2), in the arithmetic's dtype.
    """
    row, x_start, eps = _example(images, t, table, key, sample_index, flip)
    target = row.target_eps * eps + row.target_x_start * x_start
    return row.weight.flatten() * (prediction.to(target.dtype) - target).square().mean(dim=(1, 2, 3))


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    shift: Tensor | None = None,
    silu: bool = True,
    dropout: Dropout | None = None,
    eps: float = GROUP_NORM_EPS,
) -> Tensor:
    """Normalise each group of channels (Wu and He 2018), then SiLU, with the time embedding and dropout.

    y = dropout(silu(group_norm(x + shift) * weight + bias)).

    Args:
        x: [N, C, H, W] float32, bfloat16 or float16 (float64 stays float64).
        weight, bias: [C].
        groups: G, which divides C.
        shift: [N, C], added to x before its statistics are taken: the paper's time embedding.
        silu: whether to end in SiLU.
        dropout: which activations to drop after SiLU; those kept are divided by 1 - probability.
        eps: added to the variance.

    Returns:
        [N, C, H, W] in x's dtype and layout.

    Raises:
        ValueError: groups do not divide C.
    """
    if x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels do not divide into {groups} groups")
    compute = torch.promote_types(x.dtype, torch.float32)
    h = x.to(compute)
    if shift is not None:
        h = h + shift.to(compute)[:, :, None, None]
    h = group_norm(h, groups, weight.to(compute), bias.to(compute), eps)
    if silu:
        h = F.silu(h)
    if dropout is not None and dropout.probability > 0:
        address, shape = NoiseAddress(dropout.key, dropout.sample_index), (x.shape[1], x.shape[2], x.shape[3])
        dropped = random_words_below(address, dropout.layer, Stream.DROPOUT, shape, drop_threshold(dropout.probability))
        h = torch.where(dropped, 0.0, h / (1 - dropout.probability))
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return h.to(x.dtype, memory_format=torch.channels_last if channels_last else torch.preserve_format)


def group_norm_silu_and_residual(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, shift: Tensor | None = None, added: Tensor | None = None,
    beside: Tensor | None = None, silu: bool = True, eps: float = GROUP_NORM_EPS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `group_norm_silu` of h at the head of a residual branch: return y, and h for the connection past it.

    h = x + added + shift, and beside its channels those of `beside`: what the branch before ends with, and a skip
    connection. A kernel adds up and joins what it reads anyway, and h's gradients, through y and past the branch.

    Args:
        x, shift, groups, silu, eps: as for `group_norm_silu`; weight and bias are those of all channels of h.
        added: like x.
        beside: [N, B, H, W], otherwise like x.

    Returns:
        y and h [N, C + B, H, W], like x.
    """
    terms = [term for term in (added, None if shift is None else shift[:, :, None, None]) if term is not None]
    h = sum(terms, x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype) if terms else x
    h = h if beside is None else torch.cat([h, beside], dim=1)
    return group_norm_silu(h, weight, bias, groups, silu=silu, eps=eps), h


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embed timesteps as sinusoids (Ho et al. 2020, Appendix B; Vaswani et al. 2017).

    Args:
        t: [N] timesteps, integers or floats.
        dim: size of the embedding, even.
        dtype: of the arithmetic and the result.

    Returns:
        [N, dim]: sines of t * exp(-ln(10000) * i / (dim/2 - 1)) for i below dim/2, then the cosines.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=dtype, device=t.device) * (-math.log(10000.0) / max(half - 1, 1))
    angle = t.to(dtype)[:, None] * exponent.exp()[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def reverse_step(
    x: Tensor,
    prediction: Tensor,
    rows: Tensor,
    step: Tensor,
    key: Tensor,
    sample_index: Tensor,
    *,
    x0: Tensor | None = None,
    model_input: Tensor | None = None,
    clip: bool,
    noisy: bool,
) -> None:
    """Take one row of a sampler's table, in place (see `samplers`; Ho et al. 2020, Algorithm 2, line 4).

    In place, because a captured loop needs every step to read where the last one wrote.

    Args:
        x: [N, C, H, W] float32 x_t, overwritten with x at the next row's t.
        prediction: [N, C, H, W], what the U-Net returned for x.
        rows: [K, 8], the table; the columns are those of `Row`.
        step: [1] int64, the row's number 0..K-1.
        key: [2] int64 words of the seed.
        sample_index: [N] int64 numbers of the images.
        x0: [N, C, H, W] float32, for multistep samplers: the last step's x0 (zeros at first), then this one's.
        model_input: [N, C, H, W], overwritten with x in the dtype that the U-Net reads.
        clip: clip x0 to [-1, 1].
        noisy: whether any row adds noise; without, none is made.
    """
    row = Row(*rows.index_select(0, step).to(x.dtype)[0])
    prediction = prediction.to(x.dtype)
    estimate = row.x0_from_x * x - row.x0_from_prediction * prediction
    if clip:
        estimate = estimate.clamp(-1, 1)
    x_next = row.next_from_x0 * estimate + row.next_from_x * x + row.next_from_prediction * prediction
    if x0 is not None:
        x_next = x_next + row.next_from_x0_prev * x0
        x0.copy_(estimate)
    if noisy:
        shape = (x.shape[1], x.shape[2], x.shape[3])
        x_next = x_next + row.noise * normal(NoiseAddress(key, sample_index), step + 1, Stream.SAMPLING, shape, x.dtype)
    x.copy_(x_next)
    if model_input is not None:
        model_input.copy_(x)


def learning_rate_at(step: Tensor, learning_rate: float, warmup_steps: int, steps: int, cooldown_steps: int) -> Tensor:
    """Return the rate of a step, from 0, of so many: it rises over the first and falls over the last; [] float64."""
    rise = ((step + 1).double() / max(warmup_steps, 1)).clamp(max=1.0)
    fall = ((steps - step).double() / cooldown_steps).clamp(max=1.0) if cooldown_steps else 1.0
    return learning_rate * rise * fall


def ema_decay_at(step: Tensor, ema_decay: float) -> Tensor:
    """Return the average's decay at a step: small at first, so that it forgets the initial weights; [] float64."""
    return ((1 + step).double() / (10 + step)).clamp(max=ema_decay)


def adam_ema(
    weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, gradient: Tensor, loss: Tensor, numbers: Tensor,
    figures: Tensor, low_precision: Tensor | None,
    *, learning_rate: float, warmup_steps: int, steps: int, cooldown_steps: int, beta2: float, clip_norm: float,
    ema_decay: float,
) -> None:  # fmt: skip
    """Take Adam's n-th step with a clipped gradient, and let the average follow, in place (Kingma and Ba 2015, Alg. 1).

    g = gradient / max(|gradient| / clip_norm, 1);  m = beta1*m + (1 - beta1)*g;  v = beta2*v + (1 - beta2)*g^2;
    w = w - lr * (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps);  ema = ema + (1 - decay)*(w - ema).

    From the first loss or gradient on that is not finite, no weight, moment, average or count moves any more.

    Args:
        weights, exp_avg, exp_avg_sq, ema: [P] float32: w, m, v and the average of all parameters side by side.
        gradient: [P]; plain PyTorch leaves it clipped.
        loss: [] float32, of the step.
        numbers: [4] int64, those of `StepNumbers`; the step decides on the rate and the decay.
        figures: [3] float32, those of `StepFigures`.
        low_precision: [P], written with the new weights, if the U-Net computes with such; or None.
        learning_rate, warmup_steps, steps, cooldown_steps: see `learning_rate_at`.
        beta2: of Adam; beta1 is 0.9.
        clip_norm: the largest norm of the gradient; 0 is any.
        ema_decay: see `ema_decay_at`.
    """
    number, figure = StepNumbers(*numbers.unbind()), StepFigures(*figures.unbind())
    # In parts: a CPU adds up all squares in one float32, which is 0.2% short for 36 million of them.
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradient.split(1 << 14))))
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    number.bad_step.copy_(torch.where((number.bad_step < 0) & ~finite, number.step, number.bad_step))
    moves = number.bad_step < 0
    number.updates.add_(moves)
    number.loss_steps.add_(moves)
    figure.learning_rate.copy_(learning_rate_at(number.step, learning_rate, warmup_steps, steps, cooldown_steps))
    figure.gradient_norm.copy_(norm)
    figure.loss_sum.add_(torch.where(moves, loss, 0.0))
    scale = (norm / clip_norm).clamp(min=1.0) if clip_norm else torch.ones_like(norm)
    # One pass over memory: it divides by grad_scale and does nothing where found_inf is 1.
    torch._fused_adam_(
        [weights], [gradient], [exp_avg], [exp_avg_sq], [], [number.updates.float()],
        lr=figure.learning_rate, beta1=ADAM_BETA1, beta2=beta2, eps=ADAM_EPS,
        weight_decay=0.0, amsgrad=False, maximize=False, grad_scale=scale.float(), found_inf=(~moves).float(),
    )  # fmt: skip
    decay = torch.where(moves, ema_decay_at(number.step, ema_decay), 1.0)
    ema.lerp_(weights, (1 - decay).to(ema.dtype))
    if low_precision is not None:
        low_precision.copy_(weights)
