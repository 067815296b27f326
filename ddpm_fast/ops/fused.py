"""The ops as Triton kernels: the launchers of `kernels/`, registered with PyTorch under `ddpm_fast::`.

So autograd, torch.compile, torch.export and graph capture see one opaque op with a known result. An op's schema follows
from its launcher's annotations. Kernels run on an NVIDIA GPU, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1;
for tests); elsewhere they refuse. Images are NHWC. Only noise_mse and group_norm_silu can be differentiated.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ddpm_fast.constants import GROUP_NORM_EPS
from ddpm_fast.kernels import adam_ema, noise_mse, q_sample, reverse_step, timestep_embedding
from ddpm_fast.kernels import group_norm_silu as norm
from ddpm_fast.kernels import group_norm_silu_backward as norm_backward
from ddpm_fast.ops.reference import Dropout

NHWC = torch.channels_last

Q_SAMPLE = custom_op("ddpm_fast::q_sample", q_sample.q_sample, mutates_args=())
NOISE_MSE = custom_op("ddpm_fast::noise_mse", noise_mse.noise_mse, mutates_args=())
NOISE_MSE_BACKWARD = custom_op("ddpm_fast::noise_mse_backward", noise_mse.noise_mse_backward, mutates_args=())
GROUP_NORM_SILU = custom_op("ddpm_fast::group_norm_silu", norm.group_norm_silu, mutates_args=())
GROUP_NORM_SILU_OF_SUM = custom_op("ddpm_fast::group_norm_silu_of_sum", norm.group_norm_silu_of_sum, mutates_args=())
GROUP_NORM_SILU_BACKWARD = custom_op(
    "ddpm_fast::group_norm_silu_backward", norm_backward.group_norm_silu_backward, mutates_args=()
)
TIMESTEP_EMBEDDING = custom_op("ddpm_fast::timestep_embedding", timestep_embedding.timestep_embedding, mutates_args=())
REVERSE_STEP = custom_op("ddpm_fast::reverse_step", reverse_step.reverse_step, mutates_args={"x", "x0", "model_input"})
UPDATED = {"weights", "exp_avg", "exp_avg_sq", "ema", "low_precision", "numbers", "figures"}
ADAM_EMA = custom_op("ddpm_fast::adam_ema", adam_ema.adam_ema, mutates_args=UPDATED)


@Q_SAMPLE.register_fake
def _(images: Tensor, *rest: Tensor, flip: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty_like(images, dtype=dtype, memory_format=NHWC)


@NOISE_MSE.register_fake
def _(prediction: Tensor, *rest: Tensor, **options: bool) -> Tensor:
    return prediction.new_empty(len(prediction), dtype=torch.float32)


@NOISE_MSE_BACKWARD.register_fake
def _(grad: Tensor, prediction: Tensor, *rest: Tensor, **options: bool) -> Tensor:
    return torch.empty_like(prediction, memory_format=NHWC)


def _save_noise_mse(ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _differentiate_noise_mse(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # contiguous: the gradient of a mean over images is one number, expanded.
    return NOISE_MSE_BACKWARD(grad.contiguous(), *ctx.saved_tensors, **ctx.options), None, None, None, None, None


NOISE_MSE.register_autograd(_differentiate_noise_mse, setup_context=_save_noise_mse)


@GROUP_NORM_SILU.register_fake
def _(x: Tensor, *rest: Tensor | None, groups: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, memory_format=NHWC), mean, rstd


@GROUP_NORM_SILU_OF_SUM.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor | None, groups: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2))
    h = x.new_empty(len(x), x.shape[2], x.shape[3], len(weight)).permute(0, 3, 1, 2)
    return torch.empty_like(h), h, mean, rstd


@GROUP_NORM_SILU_BACKWARD.register_fake
def _(
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    *rest: Tensor | None,
    beside: int = 0,
    **options: Any,
) -> list[Tensor]:
    dx, dbeside = (torch.empty_like(x[:, :channels], memory_format=NHWC) for channels in (x.shape[1] - beside, beside))
    gradients = [dx, torch.empty_like(weight), torch.empty_like(bias)]
    dshift = [] if shift is None else [shift.new_empty(shift.shape)]
    return [*gradients, *dshift, *([dbeside] if beside else [])]


def _save_group_norm_silu(
    ctx: Any, inputs: tuple[Tensor | None, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(*statistics, *inputs)
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "eps"}


def _differentiate_group_norm_silu(ctx: Any, dy: Tensor, *statistics: Tensor) -> tuple[Tensor | None, ...]:
    dy = dy.contiguous(memory_format=NHWC)  # what follows may hand back any layout
    dx, dweight, dbias, *dshift = GROUP_NORM_SILU_BACKWARD(dy, *ctx.saved_tensors, **ctx.options)
    return dx, dweight, dbias, dshift[0] if dshift else None, None, None


GROUP_NORM_SILU.register_autograd(_differentiate_group_norm_silu, setup_context=_save_group_norm_silu)


def _group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, dropout: Dropout | None = None, **options: Any
) -> Tensor:
    # Dropout goes in part by part, since a schema has no named tuples, and y alone comes out.
    probability, key, sample_index, layer = dropout or (0.0, None, None, 0)
    options |= {"key": key, "sample_index": sample_index, "probability": probability, "layer": layer}
    y, _, _ = GROUP_NORM_SILU(x, weight, bias, groups=groups, **options)
    return y


class _GroupNormSiluAndResidual(torch.autograd.Function):
    # Not a registered op, which may not return one of its inputs.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        added: Tensor | None,
        beside: Tensor | None,
        options: dict[str, Any],
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        if shift is None and added is None and beside is None:
            (y, *statistics), h = GROUP_NORM_SILU(x, weight, bias, **options, eps=eps), x
        else:
            y, h, *statistics = GROUP_NORM_SILU_OF_SUM(x, weight, bias, shift, added, beside, **options, eps=eps)
        ctx.save_for_backward(*statistics, h, weight, bias)
        ctx.options = options | {"beside": 0 if beside is None else beside.shape[1]}
        return y, h

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, other = (gradient.contiguous(memory_format=NHWC) for gradient in grad_outputs)
        dx, dweight, dbias, *rest = GROUP_NORM_SILU_BACKWARD(dy, *ctx.saved_tensors, other=other, **ctx.options)
        _, _, _, for_shift, for_added, *_ = ctx.needs_input_grad
        dshift = dx.sum((2, 3), dtype=torch.float32) if for_shift else None
        return dx, dweight, dbias, dshift, dx if for_added else None, rest[0] if rest else None, None, None


def _group_norm_silu_and_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    beside: Tensor | None = None,
    silu: bool = True,
    eps: float = GROUP_NORM_EPS,
) -> tuple[Tensor, Tensor]:
    options = {"groups": groups, "silu": silu}
    y, h = _GroupNormSiluAndResidual.apply(x, weight, bias, shift, added, beside, options, eps)
    return y, h


def _reverse_step(*given: Tensor, x0: Tensor | None = None, model_input: Tensor | None = None, **named: Any) -> None:
    # Not defaults of the kernel's own: PyTorch 2.11 fails on a mutated argument that is left at its default.
    REVERSE_STEP(*given, x0=x0, model_input=model_input, **named)


TIMESTEP_EMBEDDING.register_fake(lambda t, dim, dtype=torch.float32: t.new_empty(len(t), dim, dtype=dtype))
REVERSE_STEP.register_fake(lambda *arguments, **options: None)
ADAM_EMA.register_fake(lambda *arguments, **options: None)

FUNCTIONS = {
    "q_sample": Q_SAMPLE,
    "noise_mse": NOISE_MSE,
    "group_norm_silu": _group_norm_silu,
    "group_norm_silu_and_residual": _group_norm_silu_and_residual,
    "timestep_embedding": TIMESTEP_EMBEDDING,
    "reverse_step": _reverse_step,
    "adam_ema": ADAM_EMA,
}
"""The six ops by their names in `ddpm_fast.ops.Ops`."""
