"""Stand-ins for what CUDA libraries compute, and the bytes that calls move.

cuDNN's convolutions and attention and cuBLAS's products return tensors that nothing was written to, laid out as PyTorch
lays them out, and note themselves. Kernels of Inductor and of the engine, and passes over all parameters, are real, and
note the bytes that they move: each input and each output once.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from bench.launches.record import note, size

LAUNCHERS = {
    "q_sample": ("q_sample",),
    "noise_mse": ("noise_mse", "noise_mse_backward"),
    "group_norm_silu": ("group_norm_silu", "group_norm_silu_of_sum"),
    "group_norm_silu_backward": ("group_norm_silu_backward",),
    "timestep_embedding": ("timestep_embedding",),
    "reverse_step": ("reverse_step",),
    "adam_ema": ("adam_ema",),
}
"""The engine's launchers by the file below kernels/ that holds them."""
PASSES = (
    (torch, "_foreach_copy_"),
    (torch, "_foreach_add_"),
    (torch, "_fused_adam_"),
    (torch.linalg, "vector_norm"),
    (Tensor, "lerp_"),
    (Tensor, "copy_"),
)
"""PyTorch's passes over all parameters that a training step takes."""
WRITTEN = {"reverse_step": 1, "adam_ema": 4, "_foreach_add_": 1, "_fused_adam_": 4, "lerp_": 1}
"""How many of its first arguments a call reads and writes back: Adam also the gradients, which it scales."""


def _call(kind: str, *tensors: Any) -> None:
    note("call", kind, size(tensors))


def _in_cudnns_layout(x: Tensor, weight: Tensor, *others: Tensor) -> tuple[torch.memory_format, list[Tensor]]:
    """Return the layout that cuDNN is called in, and the tensors in it: PyTorch copies those that are not."""
    backend = torch._C._ConvBackend.Cudnn  # pyright: ignore[reportAttributeAccessIssue]
    layout = torch._C._conv_determine_backend_memory_format(x, weight, backend)  # pyright: ignore[reportAttributeAccessIssue]
    taken = []
    for tensor in (x, weight, *others):
        if not tensor.is_contiguous(memory_format=layout):
            tensor = torch.empty_like(tensor, memory_format=layout)
            _call("laid out for cuDNN", tensor, tensor)
        taken.append(tensor)
    return layout, taken


def _convolution(
    x: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *options: bool,
) -> Tensor:
    layout, (x, weight) = _in_cudnns_layout(x, weight)
    sizes = zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    out_size = [(length + 2 * pad - dilate * (k - 1) - 1) // step + 1 for length, pad, dilate, k, step in sizes]
    out = torch.empty([len(x), len(weight), *out_size], dtype=x.dtype, device=x.device, memory_format=layout)
    _call("convolution", x, weight, out)
    return out


def _transposed_convolution(
    x: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    output_padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *options: bool,
) -> Tensor:
    layout, (x, weight) = _in_cudnns_layout(x, weight)
    sizes = zip(x.shape[2:], padding, output_padding, dilation, weight.shape[2:], stride, strict=True)
    out_size = [
        (length - 1) * step - 2 * pad + dilate * (k - 1) + more + 1 for length, pad, more, dilate, k, step in sizes
    ]
    out = torch.empty([len(x), weight.shape[1], *out_size], dtype=x.dtype, device=x.device, memory_format=layout)
    _call("convolution", x, weight, out)
    return out


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    layout, (x, weight, grad) = _in_cudnns_layout(x, weight, grad)
    dx = torch.empty_like(x, memory_format=layout) if mask[0] else None
    dweight = torch.empty_like(weight, memory_format=layout) if mask[1] else None
    for gradient, other in ((dx, weight), (dweight, x)):
        if gradient is not None:
            _call("convolution", grad, other, gradient)
    return dx, dweight, grad.sum((0, 2, 3)) if mask[2] else None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keeps_sums: bool,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    n, heads, queries, _ = q.shape
    out = torch.empty_like(q)  # dense, where q is a slice
    shape = (n, heads, queries, 1) if keeps_sums else (0,)
    sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
    _call("attention", q, k, v, out, sums)
    return out, sums, None, None, queries, k.shape[2], seed, offset, q.new_empty(0)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any, **options: Any) -> Any:
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _call("attention", grad, q, k, v, out, gradients)
    return gradients


def _product(shape: Callable[..., tuple[int, ...]], count: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return a matrix product and its form with `out`; `count` tensors come first, the last two are multiplied."""

    def into(*tensors: Tensor, out: Tensor, **options: Any) -> Tensor:
        _call("matrix product", *tensors[:count], out)
        return out

    def product(*tensors: Tensor, **options: Any) -> Tensor:
        a, b = tensors[count - 2 : count]
        return into(*tensors, out=a.new_empty(shape(a, b)))

    return product, into


def _implementations() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {
        "cudnn_convolution": _convolution,
        "cudnn_convolution_transpose": _transposed_convolution,
        "convolution_backward": _convolution_backward,
        "_scaled_dot_product_cudnn_attention": _attention,
        "_scaled_dot_product_cudnn_attention_backward": _attention_backward,
    }
    for name, count in (("mm", 2), ("addmm", 3), ("bmm", 2), ("baddbmm", 3)):
        found[name], found[f"{name}.out"] = _product(lambda a, b: (*a.shape[:-1], b.shape[-1]), count)
    return found


def _noting(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the function, which also notes the bytes that it reads and writes."""

    @wraps(function)  # from whose annotations a registered launcher gets its schema
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        written = arguments[: WRITTEN.get(name, 0)]
        returned = () if name.endswith("_") else (result,)  # in place: one of the arguments
        note("moved", name, size([*arguments, *options.values(), *written, *returned]))
        return result

    return call


def _run_noting(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: CachingAutotuner, *arguments: Any, **options: Any) -> Any:
        meta = self.inductor_meta
        note("moved", self.fn.__name__, round(1e9 * (meta.get("kernel_num_gb") or 0)))
        if meta.get("atomic_add_found"):
            note("atomic", self.fn.__name__)
        return run(self, *arguments, **options)

    return call


@contextmanager
def standing_in():
    """Put the stand-ins in place; until the process ends, PyTorch's own convolutions and products are gone."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in _implementations().items():
        library.impl(name, function, "CUDA")
    with ExitStack() as stack:
        for file, names in LAUNCHERS.items():
            module = importlib.import_module(f"ddpm_fast.kernels.{file}")
            for name in names:
                stack.enter_context(mock.patch.object(module, name, _noting(getattr(module, name), name)))
        for owner, name in PASSES:
            stack.enter_context(mock.patch.object(owner, name, _noting(getattr(owner, name), name)))
        run = _run_noting(CachingAutotuner.run)
        stack.enter_context(mock.patch.object(CachingAutotuner, "run", run))
        stack.enter_context(inductor_config.patch(benchmark_kernel=True))  # which counts a kernel's bytes
        yield
    library._destroy()
