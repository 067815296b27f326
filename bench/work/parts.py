"""Where the time of a step goes, read off PyTorch's profiler.

On a CPU every operator's own time counts for the engine's op that called it, or by its name. On a GPU it is the
kernels that count, by their names, since the replay of a graph has no operators.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bench.timing.clock import Clock, Work
from ddpm_fast import ops

OUTSIDE = "outside operators and kernels"
HEAVIEST = 4
"""Kernels of a part that are named."""
LONGEST = 160
"""Characters of a kernel's name: templates make some of them pages long."""

# The first pattern that a name matches decides.
PARTS: tuple[tuple[str, str], ...] = (
    # Inductor names a kernel after all that it fused; its templates (tem) are convolutions and matrix products.
    ("fused by the compiler", r"^triton_(?!tem)"),
    ("noise and the reverse step", r"reverse_step"),
    ("noise and the loss", r"q_sample|noise_mse"),
    ("time embedding", r"timestep_embedding"),
    (
        "GroupNorm and SiLU",
        r"group_norm|GroupNorm|RowwiseMoments|ComputeInternalGradients|silu"
        # the engine's own kernels
        r"|^(statistics|normalize|sums|input_gradient|parameter_gradient)_kernel",
    ),
    ("attention", r"attention|flash|fmha|_sdpa"),
    ("convolution", r"conv|fprop|dgrad|wgrad|cudnn.*nhwc|implicit_gemm|nchwToNhwc|nhwcToNchw"),
    ("matrix product", r"addmm|aten::b?mm$|_b?mm|gemm|gemv|nvjet|cublas|splitK"),
    ("update of the weights", r"[Aa]dam|multi_tensor|_foreach"),
)
OTHER = "copies and elementwise"


def part_of(name: str) -> str:
    """Return the part of a step that an operator or a kernel belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, name)), OTHER)


@contextmanager
def labelled_ops() -> Iterator[None]:
    """Let what is built here put the names of plain PyTorch's ops into profiles: what an op calls counts for the op."""

    def labelled(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"op::{name}"):
                return op(*args, **kwargs)

        return call

    functions = {name: labelled(name, op) for name, op in vars(ops.REFERENCE).items() if callable(op)}
    with mock.patch.object(ops, "REFERENCE", replace(ops.REFERENCE, **functions)):
        yield


def _name_on_cpu(event: FunctionEvent) -> str:
    """Return the op around an operator, else its own name."""
    name, parent = event.name, event.cpu_parent
    while parent is not None:
        if parent.name.startswith("op::"):
            name = parent.name
        parent = parent.cpu_parent
    return name


@dataclass
class Part:
    """What one part of a step took, and which kernels (on a CPU: operators) took it."""

    seconds: float = 0.0
    by_name: dict[str, float] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, seconds: float) -> None:
        """Count one run of a kernel."""
        self.seconds += seconds
        self.by_name[name] = self.by_name.get(name, 0.0) + seconds
        self.runs[name] += 1

    @property
    def heaviest(self) -> list[tuple[str, float, int]]:
        """The `HEAVIEST` names with their seconds and how often they ran."""
        names = sorted(self.by_name, key=lambda name: -self.by_name[name])[:HEAVIEST]
        return [(name[:LONGEST], self.by_name[name], self.runs[name]) for name in names]

    def scaled(self, scale: float) -> "Part":
        """Return the part with all times multiplied."""
        return Part(self.seconds * scale, {n: s * scale for n, s in self.by_name.items()}, self.runs)


def _by_part(events: Iterable[FunctionEvent], on_gpu: bool) -> dict[str, Part]:
    """Return what the parts took: of kernels on a GPU, of operators on a CPU."""
    found: dict[str, Part] = defaultdict(Part)
    for event in events:
        if not on_gpu:
            found[part_of(_name_on_cpu(event))].add(event.name, event.self_cpu_time_total / 1e6)
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found[part_of(event.name)].add(event.name, event.self_device_time_total / 1e6)
    return found


def time_by_part(work: Work, clock: Clock) -> dict[str, Part]:
    """Return what each part of one call of warm work, built among `labelled_ops`, takes, the longest first.

    What no operator (on a CPU) and no kernel (on a GPU) accounts for is `OUTSIDE`: Python, launches and waiting.
    """
    on_gpu = clock.device.type == "cuda"
    elapsed = clock.seconds(work)  # without the profiler, which slows operators down
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiled:
        profiled_elapsed = clock.seconds(work)
    # A GPU's kernels run as fast as without the profiler. A CPU's operators are slowed down about alike: their shares
    # hold, and their sum is brought back.
    scale = 1.0 if on_gpu else elapsed / profiled_elapsed
    found = {name: part.scaled(scale) for name, part in _by_part(profiled.events() or (), on_gpu).items()}
    found[OUTSIDE] = Part(max(0.0, elapsed - sum(part.seconds for part in found.values())))
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))
