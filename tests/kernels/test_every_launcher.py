"""What all launchers do alike: refuse by name, give the same bits twice, never wait, and run in a captured graph.

Every tensor of every launcher is made wrong, or changed between two replays, one at a time; what a single launcher
refuses besides (an odd dim, groups that do not divide) is tested beside it.
Shapes: N images, C channels, H x W pixels, G groups, P weights.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
from ddpm_fast.kernels.adam_ema import adam_ema  # noqa: E402
from ddpm_fast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_of_sum  # noqa: E402
from ddpm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward  # noqa: E402
from ddpm_fast.kernels.noise_mse import noise_mse, noise_mse_backward  # noqa: E402
from ddpm_fast.kernels.q_sample import q_sample  # noqa: E402
from ddpm_fast.kernels.reverse_step import reverse_step  # noqa: E402
from ddpm_fast.kernels.timestep_embedding import timestep_embedding  # noqa: E402

N, C, H, W, G, P = 2, 8, 5, 7, 2, 70

DROPPING = {"groups": G, "probability": 0.3, "layer": 2}
LAUNCHERS: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
    "q_sample": (q_sample, ("images", "t", "table", "key", "sample_index"), {"flip": True}),
    "noise_mse": (noise_mse, ("images", "prediction", "t", "table", "key", "sample_index"), {"flip": True}),
    "noise_mse_backward": (
        noise_mse_backward,
        ("images", "prediction", "grad", "t", "table", "key", "sample_index"),
        {"flip": True},
    ),
    "group_norm_silu": (
        group_norm_silu,
        ("x", "weight", "bias", "shift", "key", "sample_index"),
        DROPPING,
    ),
    "group_norm_silu_of_sum": (
        group_norm_silu_of_sum,
        ("x", "weight", "bias", "shift", "added", "beside"),
        {"groups": G},
    ),
    "group_norm_silu_backward": (
        group_norm_silu_backward,
        ("x", "dy", "mean", "rstd", "weight", "bias", "shift", "key", "sample_index", "other"),
        DROPPING,
    ),
    "reverse_step": (
        reverse_step,
        ("x", "prediction", "rows", "step", "key", "sample_index", "x0", "model_input"),
        {"clip": True, "noisy": True},
    ),
    "timestep_embedding": (timestep_embedding, ("t",), {"dim": 8}),
    "adam_ema": (
        adam_ema,
        ("weights", "exp_avg", "exp_avg_sq", "ema", "gradient", "loss", "numbers", "figures", "low_precision"),
        {
            "learning_rate": 0.5,
            "warmup_steps": 5,
            "steps": 9,
            "cooldown_steps": 4,
            "beta2": 0.99,
            "clip_norm": 1.0,
            "ema_decay": 0.9,
        },
    ),
}
WRITTEN = {
    "reverse_step": ("x", "x0", "model_input"),
    "adam_ema": ("weights", "exp_avg", "exp_avg_sq", "ema", "numbers", "figures", "low_precision"),
}
"""What launchers that return nothing write."""
ONLY_WRITTEN = ("model_input", "low_precision")
SINGLE = ("step", "loss")
"""Tensors of one number, which have no gaps."""
SIZES = {
    "table": (9, 5), "rows": (9, 8), "grad": (N,), "weight": (C,), "bias": (C,), "shift": (N, C),
    "mean": (N, G), "rstd": (N, G), "weights": (P,), "exp_avg": (P,), "exp_avg_sq": (P,), "ema": (P,),
    "gradient": (P,), "low_precision": (P,), "loss": (), "figures": (3,),
}  # fmt: skip
OF_SUM = {"x": 5, "added": 5, "beside": 3}
"""Channels of the maps that `group_norm_silu_of_sum` adds up and joins to C."""
WORDS = {"t": (N,), "sample_index": (N,), "key": (2,), "step": (1,)}
EVERY_TENSOR = [(launcher, name) for launcher, (_, names, _) in LAUNCHERS.items() for name in names]


def make(launcher: str, name: str, device: str) -> Tensor:
    """Return a tensor that the launchers take: images as NHWC, rows and words as numbers below 9."""
    generator = torch.Generator().manual_seed(len(name))
    if name == "numbers":
        return torch.tensor([3, 2, -1, 1], device=device)  # no bad step yet
    if name in WORDS:
        return torch.randint(0, 9, WORDS[name], generator=generator).to(device)
    of_sum = launcher == "group_norm_silu_of_sum"
    if name in SIZES:
        size = (N, OF_SUM["x"]) if of_sum and name == "shift" else SIZES[name]
        return torch.rand(size, generator=generator).to(device)
    channels = OF_SUM[name] if of_sum else C if launcher.startswith("group_norm") else 3
    return torch.rand(N, H, W, channels, generator=generator).to(device).permute(0, 3, 1, 2)


def change(tensor: Tensor) -> Tensor:
    """Return other values that a launcher takes, words below 9 again."""
    return tensor.sqrt() if tensor.is_floating_point() else (tensor + 1) % 9


def tensors_of(launcher: str, device: str) -> dict[str, Tensor]:
    return {name: make(launcher, name, device) for name in LAUNCHERS[launcher][1]}


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in tensors.items()}


def launch(launcher: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return what a launcher returns or writes."""
    op, _, options = LAUNCHERS[launcher]
    returned = op(**tensors, **options)
    values = [*returned] if isinstance(returned, tuple | list) else [returned]
    if launcher in WRITTEN:
        values = [tensors[name] for name in WRITTEN[launcher]]
    return values


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Return whether results agree bit for bit; NaN, with which all that is new begins, equals nothing."""
    assert first
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_runs_agree_bit_for_bit_and_leave_nothing_out(launcher, device):
    assert equal(*(launch(launcher, tensors_of(launcher, device)) for _ in range(2)))


@pytest.mark.parametrize(("launcher", "name"), EVERY_TENSOR)
def test_a_wrong_shape_is_refused(launcher, name, device):
    wrong = make(launcher, name, device)
    wrong = wrong[..., :-1].clone(memory_format=torch.preserve_format) if wrong.ndim else wrong[None]
    if name in ("images", "x", "weights") and name == LAUNCHERS[launcher][1][0]:
        wrong = make(launcher, name, device)[0]  # whatever shape the first has is what the others must have
    elif launcher == "timestep_embedding":
        wrong = make(launcher, name, device)[None]
    with pytest.raises(ValueError, match=f"^{name} has shape .*: it takes"):
        launch(launcher, tensors_of(launcher, device) | {name: wrong})


@pytest.mark.parametrize(("launcher", "name"), EVERY_TENSOR)
def test_a_wrong_dtype_is_refused(launcher, name, device):
    with pytest.raises(ValueError, match=f"^{name} is torch.complex64: it takes"):
        launch(launcher, tensors_of(launcher, device) | {name: make(launcher, name, device).to(torch.complex64)})


@pytest.mark.parametrize(("launcher", "name"), EVERY_TENSOR)
def test_a_wrong_device_is_refused(launcher, name, device):
    with pytest.raises(ValueError, match=f"^{name} is on meta: it takes"):
        launch(launcher, tensors_of(launcher, device) | {name: make(launcher, name, device).to("meta")})


@pytest.mark.parametrize(("launcher", "name"), [pair for pair in EVERY_TENSOR if pair[1] not in SINGLE])
def test_gaps_in_memory_are_refused(launcher, name, device):
    """Of the last dimension every second element, among NaN."""
    whole = make(launcher, name, device)
    gaps = torch.full((*whole.shape, 2), 113, dtype=whole.dtype, device=device)[..., 0].copy_(whole)
    with pytest.raises(ValueError, match=f"^{name} has strides .*: it takes"):
        launch(launcher, tensors_of(launcher, device) | {name: gaps})


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cpu_is_refused_outside_the_interpreter(launcher, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    first = LAUNCHERS[launcher][1][0]
    with pytest.raises(ValueError, match=f"^{first} is on cpu: it takes a CUDA device"):
        launch(launcher, tensors_of(launcher, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_dtype_that_a_message_names_is_taken(launcher, dtype, device):
    """Where one tensor may have it, all that may have it do, but for those of float32 alone."""
    alone = {"table", "rows", "grad", "mean", "rstd", "weights", "exp_avg", "exp_avg_sq", "ema", "loss", "numbers"}
    alone |= {"figures", *(("x", "x0") if launcher == "reverse_step" else ())}
    names = [name for name in LAUNCHERS[launcher][1] if name not in WORDS and name not in alone]
    launch(launcher, tensors_of(launcher, device) | {name: make(launcher, name, device).to(dtype) for name in names})


@pytest.mark.gpu
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_host_never_waits(launcher, device):
    tensors = tensors_of(launcher, device)
    launch(launcher, copies(tensors))  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(launcher, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("launcher", "name"), [pair for pair in EVERY_TENSOR if pair[1] not in ONLY_WRITTEN])
def test_a_replayed_graph_reads_every_tensor_anew(launcher, name, device):
    """Key, step and sample_index among them."""
    tensors = tensors_of(launcher, device)
    launch(launcher, copies(tensors))  # compiles, which no capture survives
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = launch(launcher, tensors)

    def replay(values: dict[str, Tensor]) -> list[Tensor]:
        for place, value in values.items():
            tensors[place].copy_(value)
        graph.replay()
        return [result.clone() for result in results]

    given = tensors_of(launcher, device)
    changed = given | {name: change(given[name])}
    first, second = replay(given), replay(changed)
    assert equal(first, launch(launcher, copies(given)))
    assert equal(second, launch(launcher, copies(changed)))
    assert not equal(first, second)
