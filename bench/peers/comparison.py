"""The engine beside other trainers: the same work, in turns, in one run.

Shapes: N images, K steps.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.peers import diffusers as peer_diffusers
from bench.peers import lucidrains as peer_lucidrains
from bench.peers.diffusers import Tuning
from bench.timing.clock import Clock, Work, interleave, warm_up
from bench.timing.timings import ratio
from bench.work.scenarios import Variant, default_variant, sampling, train_step, warm_up_calls
from ddpm_fast.config import Config

OURS = "ddpm-fast"
MODULES = {
    "diffusers": "diffusers.pipelines.ddpm.pipeline_ddpm",
    "denoising-diffusion-pytorch": "denoising_diffusion_pytorch",
}
"""The packages of the peers, with a module of each that imports what is used of it."""


@dataclass(frozen=True)
class Peer:
    """One way to train and to sample; building it raises where the package does not import."""

    name: str
    what: str
    """What it runs, in words, for the report."""
    train_step: Callable[[Config, int, torch.device], Work]
    """(configuration, N, device) -> one optimizer step."""
    sampling: Callable[[Config, int, int, torch.device], Work]
    """(configuration, N, K, device) -> one batch from noise in K steps."""
    compiles: bool = False
    """Whether its first call takes minutes."""
    package: str = ""
    """Of `MODULES`, which it needs. Empty: it is the engine."""
    variant: Variant | None = None
    """How the engine runs. None: it is a peer."""

    def warm_up_calls(self, training: bool) -> int:
        """Return how many calls go before the first round."""
        if self.variant is not None:
            return warm_up_calls(self.variant, training)
        return 4 if self.compiles else 1  # PyTorch's own graphs are recorded in the second call and replayed from then


def _diffusers(name: str, what: str, tuning: Tuning) -> Peer:
    build = peer_diffusers.tuned_loop if tuning.fused else peer_diffusers.pipeline
    return Peer(
        name,
        what,
        lambda config, n, device: peer_diffusers.train_step(config, n, device, tuning),
        lambda config, n, steps, device: build(config, n, steps, device, tuning),
        compiles=bool(tuning.compile_mode),
        package="diffusers",
    )


def _ours(name: str, what: str, variant: Variant) -> Peer:
    return Peer(
        name,
        what,
        lambda config, n, device: train_step(config, n, variant, device).work,
        lambda config, n, steps, device: sampling(config, n, steps, variant, device).work,
        compiles=variant.mode != "eager" and name != OURS,
        variant=variant,
    )


def peers_on(device: torch.device) -> list[Peer]:
    """Return who is compared on a device: the engine first, those that compile last."""
    default = default_variant(device)
    ours = _ours(OURS, f"the engine as it runs by default here: {default}", default)
    shipped = _diffusers("diffusers", "as shipped: float32, eager, AdamW, EMAModel, DDPMPipeline", Tuning())
    lucidrains = Peer(
        "denoising-diffusion-pytorch",
        "as shipped, around its own U-Net of the same widths, which is another network: float32, eager",
        peer_lucidrains.train_step,
        peer_lucidrains.sampling,
        package="denoising-diffusion-pytorch",
    )
    if device.type == "cuda":
        tuning = Tuning(channels_last=True, half=True, compile_mode="max-autotune", fused=True)
        what = "bfloat16, channels-last, torch.compile(mode='max-autotune') with CUDA graphs, fused AdamW and EMA"
        return [ours, shipped, lucidrains, _diffusers("diffusers, tuned", what, tuning)]
    nhwc = _diffusers("diffusers, channels-last", "as shipped, but channels-last", Tuning(channels_last=True))
    tuning = Tuning(channels_last=True, compile_mode="default", fused=True)
    what = "float32, channels-last, torch.compile, fused AdamW and EMA"
    compiled = _ours(
        f"{OURS}, compiled",
        "the engine compiled, as it is by default for sampling of half an hour and more",
        Variant(False, "compiled"),
    )
    return [ours, shipped, nhwc, lucidrains, compiled, _diffusers("diffusers, compiled", what, tuning)]


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def importable() -> Callable[[], list[str]]:
    """Begin to import the packages of `MODULES`; return what waits for it and tells which can be imported.

    It is tried in earnest, since being installed is not enough, and in processes of their own, one a package: some take
    a while, and one built for another PyTorch may take its process down.
    """
    command = [sys.executable, "-c", "import importlib, sys; importlib.import_module(sys.argv[1])"]
    trials = {
        package: subprocess.Popen([*command, module], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for package, module in MODULES.items()
    }

    def wait() -> list[str]:
        return [package for package, trial in trials.items() if trial.wait() == 0]

    return wait


def compare(
    builds: Mapping[str, Callable[[], Work]], clock: Clock, seconds: float, calls: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Time peers in turns.

    Args:
        builds: by peer's name, OURS among them; each is built and warmed up before the first round.
        clock: of their device.
        seconds: to spend on the rounds.
        calls: of each, to warm up.

    Returns:
        A row per peer: seconds per call and how many times as long as OURS it took, round by round, or the reason
        why it could not run.
    """
    works: dict[str, Work] = {}
    rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in builds}
    for name, build in builds.items():
        try:
            works[name] = build()
            rows[name]["first_call_seconds"] = warm_up(works[name], clock, calls[name])
        except Exception as error:  # whatever a peer stumbles over is its row, not this report's end
            if name == OURS:
                raise
            works.pop(name, None)
            rows[name]["reason"] = one_line(error)
    taken = interleave(works, clock, seconds)
    for name, samples in taken.items():
        rows[name]["seconds"] = samples.to_json()
        rows[name]["times_as_long"] = ratio(samples, taken[OURS]).to_json()
    return list(rows.values())
