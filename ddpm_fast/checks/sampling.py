"""Does sampling do what the textbook does, with the network that was trained?

Three links: every row of a table is the textbook's (`tables`), a loop takes each row as the table has it, with the
network of training (`loops`), and captured or compiled loops make the eager one's images.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import torch

from ddpm_fast import config as names
from ddpm_fast.checks.consistency import check_consistency, check_posterior
from ddpm_fast.checks.labels import asked_of
from ddpm_fast.checks.loops import (
    BATCH,
    IMAGES,
    LOOP,
    Network,
    check_loop,
    images_of,
    relative,
    tolerance,
    without_dropout,
)
from ddpm_fast.checks.results import CheckResult, judged
from ddpm_fast.checks.stand_in import affordable, perturb
from ddpm_fast.checks.tables import (
    KNOWN_PREDICTIONS,
    KNOWN_SAMPLERS,
    KNOWN_VARIANCES,
    TABLE,
    check_rows,
    check_timesteps_of,
    unknown,
)
from ddpm_fast.config import DiffusionConfig, SamplerConfig
from ddpm_fast.constants import Row
from ddpm_fast.diffusion import samplers
from ddpm_fast.engine import sampling
from ddpm_fast.engine.cuda_graphs import GraphBackend
from ddpm_fast.engine.execution import EAGER, Execution
from ddpm_fast.errors import MathematicsError
from ddpm_fast.model.unet import UNet

STEPS = 6
SHORT = {False: 23, True: 53}
"""Steps of the tables that are checked, in the quick part and in full: few T divide by them, so that rounding shows."""
QUICK_FLOP, MOST_FLOP = 1e8, 4e10
"""Per image and forward pass: up to which the real U-Net runs in every loop, and up to which it runs at all."""


def check_tables(diffusion: DiffusionConfig, full: bool = False) -> Iterator[CheckResult]:
    """Check all rows of every sampler against the textbook."""
    if diffusion.prediction not in KNOWN_PREDICTIONS:
        yield unknown("target", diffusion.prediction, "checked for consistency only", TABLE)
    if diffusion.variance not in KNOWN_VARIANCES:
        yield unknown("variance", diffusion.variance, "checked for consistency only", TABLE)
    for sampler in _samplers(diffusion, full):
        table = samplers.sampler_table(diffusion, sampler)
        known = sampler.sampler in KNOWN_SAMPLERS and diffusion.prediction in KNOWN_PREDICTIONS
        known &= diffusion.variance in KNOWN_VARIANCES or sampler.sampler != "ddpm"
        if sampler.sampler in KNOWN_SAMPLERS:
            yield check_timesteps_of(diffusion, sampler, table)
        yield (check_rows if known else check_consistency)(diffusion, sampler, table)
    yield check_posterior(diffusion)


def _samplers(diffusion: DiffusionConfig, full: bool) -> Iterator[SamplerConfig]:
    """Yield every sampler that there is in few steps, and the paper's in all of them."""
    total = diffusion.timesteps
    yield SamplerConfig("ddpm")
    for name in get_args(names.SamplerName):
        for spacing in get_args(names.Spacing) if full else ("trailing",):
            yield SamplerConfig(name, min(SHORT[full], total), spacing=spacing)
    yield from _loop_samplers(diffusion)


def _loop_samplers(diffusion: DiffusionConfig) -> Iterator[SamplerConfig]:
    """Yield the samplers of which a loop is run."""
    steps = min(STEPS, diffusion.timesteps)
    yield SamplerConfig("ddpm", steps)
    yield SamplerConfig("ddim", steps)
    yield SamplerConfig("ddim", steps, eta=0.7, spacing="leading")
    yield SamplerConfig("dpm++", steps, spacing="linspace")
    for name in get_args(names.SamplerName):
        if name not in KNOWN_SAMPLERS:
            yield SamplerConfig(name, steps)


def check_loops(
    unet: UNet,
    diffusion: DiffusionConfig,
    dtype: torch.dtype = torch.float32,
    execution: Execution = EAGER,
    graphs: GraphBackend | None = None,
) -> Iterator[CheckResult]:
    """Check the loop, the network in it and the reverse step, for every sampler.

    Args:
        unet: the run's, on its device, with weights that hide nothing (see `perturb`). A large one runs in one loop of
            two steps, a smaller one of its kind in all others.
        diffusion: the run's.
        dtype: of the U-Net's arithmetic in sampling.
        execution: how the run samples: other than eagerly, that is compared with the eager loop.
        graphs: what captures steps, if that is not CUDA.
    """
    flop, network = unet.estimate_flop(), Network(unet, without_dropout(unet, dtype), "")
    if flop > QUICK_FLOP:
        if flop <= MOST_FLOP:
            yield from check_loop(network, diffusion, SamplerConfig("ddim", min(2, diffusion.timesteps)), dtype, 1)
        small = _smaller(unet)
        network = Network(small, without_dropout(small, dtype), " of a smaller U-Net")
    for number, sampler in enumerate(_loop_samplers(diffusion)):
        yield from check_loop(network, diffusion, sampler, dtype, BATCH if number else IMAGES.count)
    yield _check_new_weights(network.unet, diffusion, dtype)
    if execution != EAGER:
        yield _check_execution(network.unet, diffusion, dtype, execution, graphs)


def _smaller(unet: UNet) -> UNet:
    """Return a perturbed U-Net of the same structure on the same device, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = perturb(UNet(affordable(unet.config, QUICK_FLOP)).use(unet.ops))
    return small.to(unet.conv_in.weight.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _check_new_weights(unet: UNet, diffusion: DiffusionConfig, dtype: torch.dtype) -> CheckResult:
    """Check that a loop that is told other weights samples from those, as previews in training do."""
    table = samplers.sampler_table(replace(diffusion, clip=True), SamplerConfig("ddim", min(3, diffusion.timesteps)))
    other = perturb(copy.deepcopy(unet), seed=1)
    kept, fresh = sampling.SamplingLoop(unet, table, dtype), sampling.SamplingLoop(other, table, dtype)
    kept.load_weights(other)
    images = sampling.ImageRange(0, 0, 1)
    found, right = images_of(kept, images), images_of(fresh, images)
    off = relative(found, right) if found is not None and right is not None else 0.0 if found is right else float("inf")
    name, text = "a loop samples from the weights it was told last", f"{off:.1e} off"
    return CheckResult("network", name, judged(off <= tolerance(dtype)), "a new loop's images", text, LOOP)


def _check_execution(
    unet: UNet, diffusion: DiffusionConfig, dtype: torch.dtype, execution: Execution, graphs: GraphBackend | None
) -> CheckResult:
    """Check that a whole loop as it is really run makes the eager loop's images, which were checked step by step."""
    # Leading: where alpha_bar is tiny, rounding is blown up beyond what a fault would do.
    sampler = SamplerConfig("ddpm", min(STEPS, diffusion.timesteps), spacing="leading")
    table = samplers.sampler_table(replace(diffusion, clip=True), sampler)
    name, expected = f"the {execution} loop makes the eager one's images", "the same but for rounding"
    images = asked_of(unet, IMAGES, guided=True)
    guide = unet if images.guidance != 1 else None
    eager = sampling.SamplingLoop(unet, table, dtype, guide=guide)
    really = sampling.SamplingLoop(unet, table, dtype, execution, graphs, graph_steps=2, guide=guide)
    try:
        off = relative(sampling.sample(really, images, 2), sampling.sample(eager, images, 2))
    except MathematicsError as error:
        return CheckResult("sampler", name, judged(False), expected, str(error), LOOP)
    row = Row(*table.rows.unbind(1))
    gain = float((row.next_from_prediction - row.next_from_x0 * row.x0_from_prediction).abs().sum())
    allowed = sampling.DIFFERENCE[dtype] * max(1.0, gain * (2 * images.guidance - 1))
    return CheckResult("sampler", name, judged(off <= allowed), expected, f"{off:.1e} off", LOOP)
