"""The engine's ops by name: the only place that chooses how they are computed.

Every op exists twice: in plain PyTorch (`reference`) and as a Triton kernel (`kernels/`). Each kernel is registered
with PyTorch under `ddpm_fast::`, so that autograd, torch.compile and graph capture see one opaque op with a known
result; plain PyTorch is called as it is, so that a compiler sees through it. Arguments, results and shapes are those
of `reference`, and a keyword:

    kernels  None: `RULE` decides; False: plain PyTorch; True: the kernel, which can be launched on an NVIDIA GPU, and
             on a CPU in Triton's interpreter (TRITON_INTERPRET=1; for tests).
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ddpm_fast.ops import cpu_group_norm, reference
from ddpm_fast.ops.reference import GROUP_NORM_EPS, Dropout

RULE = "on an NVIDIA GPU every op runs its Triton kernel at every shape (no GPU has been measured yet), else PyTorch"
"""Which ops run kernels when nobody says; to be narrowed by measurements in `profiles/`."""

_TRITON = importlib.util.find_spec("triton") is not None


def runs_kernel(kernels: bool | None, tensor: Tensor) -> bool:
    """Return whether an op on this tensor runs its kernel."""
    return tensor.is_cuda and _TRITON if kernels is None else kernels


@custom_op("ddpm_fast::q_sample", mutates_args=())
def _q_sample(
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    flip: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    from ddpm_fast.kernels import q_sample as kernel

    return kernel.q_sample(images, t, table, key, sample_index, flip, dtype, channels_last)


@_q_sample.register_fake
def _(images, t, table, key, sample_index, flip, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.new_empty(images.shape, dtype=dtype).contiguous(memory_format=layout)


def q_sample(
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    *,
    kernels: bool | None = None,
) -> Tensor:
    """Diffuse images to timestep t; see `reference.q_sample`. The kernel is not differentiable."""
    op = _q_sample if runs_kernel(kernels, images) else reference.q_sample
    return op(images, t, table, key, sample_index, flip, dtype, channels_last)


@custom_op("ddpm_fast::noise_mse", mutates_args=())
def _noise_mse(
    prediction: Tensor, images: Tensor, t: Tensor, table: Tensor, key: Tensor, sample_index: Tensor, flip: bool
) -> Tensor:
    from ddpm_fast.kernels import noise_mse as kernel

    return kernel.noise_mse(prediction, images, t, table, key, sample_index, flip)


_noise_mse.register_fake(lambda prediction, *rest: prediction.new_empty(prediction.shape[0], dtype=torch.float32))


@custom_op("ddpm_fast::noise_mse_backward", mutates_args=())
def _noise_mse_backward(
    grad: Tensor,
    prediction: Tensor,
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    flip: bool,
) -> Tensor:
    from ddpm_fast.kernels import noise_mse as kernel

    return kernel.noise_mse_backward(grad, prediction, images, t, table, key, sample_index, flip)


_noise_mse_backward.register_fake(lambda grad, prediction, *rest: torch.empty_like(prediction))


def _save_noise_mse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.flip = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_noise_mse(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # contiguous: the gradient of a mean over images is one number, expanded.
    return _noise_mse_backward(grad.contiguous(), *ctx.saved_tensors, ctx.flip), *[None] * 6


_noise_mse.register_autograd(_differentiate_noise_mse, setup_context=_save_noise_mse)


def noise_mse(
    prediction: Tensor,
    images: Tensor,
    t: Tensor,
    table: Tensor,
    key: Tensor,
    sample_index: Tensor,
    flip: bool = False,
    *,
    kernels: bool | None = None,
) -> Tensor:
    """Compare a prediction with its target, made again from its address; see `reference.noise_mse`."""
    op = _noise_mse if runs_kernel(kernels, prediction) else reference.noise_mse
    return op(prediction, images, t, table, key, sample_index, flip)


@custom_op("ddpm_fast::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    scale_shift: Tensor | None,
    key: Tensor | None,
    sample_index: Tensor | None,
    groups: int,
    silu: bool,
    probability: float,
    layer: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and mean and rstd [N, G] for the backward pass."""
    from ddpm_fast.kernels import group_norm_silu as kernel

    dropout = _dropout(probability, key, sample_index, layer)
    return kernel.group_norm_silu(
        x, weight, bias, groups, shift=shift, scale_shift=scale_shift, silu=silu, dropout=dropout, eps=eps
    )


@_group_norm_silu.register_fake
def _(x, weight, bias, shift, scale_shift, key, sample_index, groups, silu, probability, layer, eps):
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.channels_last), mean, rstd


@custom_op("ddpm_fast::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    scale_shift: Tensor | None,
    key: Tensor | None,
    sample_index: Tensor | None,
    groups: int,
    silu: bool,
    probability: float,
    layer: int,
) -> list[Tensor]:
    """Return the gradients of x, weight, bias and, where they were given, of shift and scale_shift."""
    from ddpm_fast.kernels import group_norm_silu_backward as kernel

    dropout = _dropout(probability, key, sample_index, layer)
    gradients = kernel.group_norm_silu_backward(
        dy, x, mean, rstd, weight, bias, groups, shift=shift, scale_shift=scale_shift, silu=silu, dropout=dropout
    )
    return [gradient for gradient in gradients if gradient is not None]


@_group_norm_silu_backward.register_fake
def _(dy, mean, rstd, x, weight, bias, shift, scale_shift, *rest):
    dx, others = torch.empty_like(x, memory_format=torch.channels_last), (weight, bias, shift, scale_shift)
    return [dx, *(value.new_empty(value.shape) for value in others if value is not None)]


def _dropout(probability: float, key: Tensor | None, sample_index: Tensor | None, layer: int) -> Dropout | None:
    return None if key is None or sample_index is None else Dropout(probability, key, sample_index, layer)


def _save_group_norm_silu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    ctx.options = inputs[7:11]
    ctx.save_for_backward(mean, rstd, *inputs[:7])
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate_group_norm_silu(ctx: Any, dy: Tensor, *statistics: Tensor) -> tuple[Tensor | None, ...]:
    mean, rstd, x, weight, bias, shift, scale_shift, key, sample_index = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)  # what follows may hand back any layout
    gradients = iter(
        _group_norm_silu_backward(dy, mean, rstd, x, weight, bias, shift, scale_shift, key, sample_index, *ctx.options)
    )
    given = (next(gradients) if value is not None else None for value in (x, weight, bias, shift, scale_shift))
    return *given, *[None] * 7


_group_norm_silu.register_autograd(_differentiate_group_norm_silu, setup_context=_save_group_norm_silu)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    shift: Tensor | None = None,
    scale_shift: Tensor | None = None,
    silu: bool = True,
    dropout: Dropout | None = None,
    eps: float = GROUP_NORM_EPS,
    kernels: bool | None = None,
) -> Tensor:
    """Normalise each group of channels, then SiLU; see `reference.group_norm_silu`. The kernel takes x as NHWC."""
    if not runs_kernel(kernels, x):
        options: dict[str, Any] = {"shift": shift, "scale_shift": scale_shift, "silu": silu, "dropout": dropout}
        return reference.group_norm_silu(
            x, weight, bias, groups, **options, eps=eps, group_norm=cpu_group_norm.group_norm
        )
    probability, key, sample_index, layer = dropout or (0.0, None, None, 0)
    y, _, _ = _group_norm_silu(
        x, weight, bias, shift, scale_shift, key, sample_index, groups, silu, probability, layer, eps
    )
    return y


@custom_op("ddpm_fast::timestep_embedding", mutates_args=())
def _timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    from ddpm_fast.kernels import timestep_embedding as kernel

    return kernel.timestep_embedding(t, dim, dtype)


_timestep_embedding.register_fake(lambda t, dim, dtype: t.new_empty(t.shape[0], dim, dtype=dtype))


def timestep_embedding(
    t: Tensor, dim: int, dtype: torch.dtype = torch.float32, *, kernels: bool | None = None
) -> Tensor:
    """Embed timesteps as sinusoids; see `reference.timestep_embedding`."""
    return (_timestep_embedding if runs_kernel(kernels, t) else reference.timestep_embedding)(t, dim, dtype)


@custom_op("ddpm_fast::reverse_step", mutates_args={"x", "x0", "model_input"})
def _reverse_step(
    x: Tensor,
    out: Tensor,
    rows: Tensor,
    step: Tensor,
    key: Tensor,
    sample_index: Tensor,
    x0: Tensor | None,
    model_input: Tensor | None,
    *,
    clip: bool,
    noisy: bool,
) -> None:
    from ddpm_fast.kernels import reverse_step as kernel

    kernel.reverse_step(x, out, rows, step, key, sample_index, clip=clip, noisy=noisy, x0=x0, model_input=model_input)


_reverse_step.register_fake(lambda *arguments, **options: None)


def reverse_step(
    x: Tensor,
    out: Tensor,
    rows: Tensor,
    step: Tensor,
    key: Tensor,
    sample_index: Tensor,
    *,
    clip: bool,
    noisy: bool,
    x0: Tensor | None = None,
    model_input: Tensor | None = None,
    kernels: bool | None = None,
) -> None:
    """Take one row of a sampler's table, in place; see `reference.reverse_step`."""
    op = _reverse_step if runs_kernel(kernels, x) else reference.reverse_step
    op(x, out, rows, step, key, sample_index, clip=clip, noisy=noisy, x0=x0, model_input=model_input)
