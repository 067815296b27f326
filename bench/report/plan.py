"""What is measured, in order of importance: whoever has nine minutes gets the figures that everybody asks for first.

A plan is made from the kind of device alone, without touching one: it can be looked at before there is a GPU.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.peers.comparison import MODULES, Peer, peers_on
from bench.report import measurements
from bench.report.agreement import agreement
from bench.report.budget import Costs, Measurement, compiled
from bench.report.sizes import Sampling, Sizes, Training
from bench.timing.clock import clock_for
from bench.work.first_step import Kind
from bench.work.ops import builders
from bench.work.scenarios import CONFIGURATIONS, Variant, default_variant, variants

EAGER_STEPS = 50
"""Of a sampling loop whose every step is launched from Python: enough to tell what a step costs."""
GRAPH_STEPS = (1, 100)
"""Steps in one captured graph, beside the engine's own choice."""
HEAVIEST_OPS = 6
"""Ops that are measured before other ops: those that move the most bytes."""
HEADLINES = 2
"""Comparisons with tuned peers that do not wait for the end: the large batch's sampling, and training."""
PEER_SLOWNESS = 4.0
"""How many times the engine's arithmetic takes in an eager float32 peer on a GPU."""
PEER_COMPILE_SECONDS = {"cuda": 150.0, "cpu": 60.0}
"""Of a peer's sampling step, on a GPU with autotuning; a training step takes twice that."""


def _loop(size: Sampling, variant: Variant) -> Measurement:
    config = CONFIGURATIONS[size.configuration]
    return Measurement(
        f"loops/{size.configuration}-batch{size.batch}/{variant}",
        "loops",
        lambda costs: costs.scenario(config, size.batch, size.steps, variant),
        partial(measurements.loop, size=size, variant=variant),
        compiled(size.configuration, size.batch, False, variant),
    )


def _training(size: Training, variant: Variant) -> Measurement:
    config = CONFIGURATIONS[size.configuration]
    return Measurement(
        f"training/{size.configuration}-batch{size.batch}/{variant}",
        "training",
        lambda costs: costs.scenario(config, size.batch, 1, variant, training=True),
        partial(measurements.training, size=size, variant=variant),
        compiled(size.configuration, size.batch, True, variant),
    )


def _agreement(size: Sampling, default: Variant) -> Measurement:
    return Measurement(
        f"agreement/{size.configuration}-batch{size.batch}",
        "agreement",
        lambda costs: 8.0,
        partial(agreement, size=size),
        compiled(size.configuration, size.batch, False, default),
    )


def _parts(size: Training, steps: int, default: Variant) -> Measurement:
    config, training = CONFIGURATIONS[size.configuration], not steps

    def seconds(costs: Costs) -> float:
        return 8.0 + 6 * (steps or 1) * costs.step_seconds(config, size.batch, training, default.mode)

    return Measurement(
        f"parts/{'train' if training else 'sampling'}-{size.configuration}-batch{size.batch}",
        "parts",
        seconds,
        partial(measurements.parts, size=size, steps=steps),
        compiled(size.configuration, size.batch, training, default),
    )


def _peers(size: Training, steps: int, who: list[Peer], group: str) -> Measurement:
    config, kind = CONFIGURATIONS[size.configuration], "sampling" if steps else "train"

    def seconds(costs: Costs) -> float:
        compiling = PEER_COMPILE_SECONDS[costs.kind] * (1 if steps else 2)
        total = costs.sizes.seconds * len(who)
        for one in who:
            slowness = PEER_SLOWNESS if costs.kind == "cuda" and one.package and not one.compiles else 1.0
            call = (steps or 1) * slowness * costs.step_seconds(config, size.batch, not steps, "eager")
            total += 2 + (one.warm_up_calls(not steps) + 1) * call + (compiling if one.compiles else 0.0)
        return total

    ours = [found for one in who if one.variant for found in compiled(*size, not steps, one.variant)]
    return Measurement(
        f"{group}/{kind}-{size.configuration}-batch{size.batch}",
        "peers",
        seconds,
        partial(measurements.peers, size=size, steps=steps, who=[one.name for one in who]),
        tuple(ours),
    )


def _all_peers(device: torch.device, sizes: Sizes, packages: Collection[str], compiles: bool) -> list[Measurement]:
    """Compare with those that start at once, or with those that compile, which take minutes and come apart."""
    ours, *others = peers_on(device)
    who = [one for one in others if one.compiles == compiles and (not one.package or one.package in packages)]
    if not any(one.package for one in who):
        return []
    group = "peers-compiled" if compiles else "peers"
    sampled = [
        _peers(Training(size.configuration, size.batch), size.steps, [ours, *who], group)
        for size in sizes.peer_sampling
    ]
    trained = [_peers(size, 0, [ours, *who], group) for size in sizes.peer_training]
    # Headlines first: sampling in the largest batch, training, then the others.
    return [*sampled[:1], *trained[:1], *sampled[1:], *trained[1:]]


def _ops(device: torch.device, size: Training, norms: int | None) -> list[Measurement]:
    names = builders(CONFIGURATIONS[size.configuration], size.batch, torch.float32, clock_for(device), norms)
    compiling = 8.0 if device.type == "cuda" else 0.0
    return [
        Measurement(
            f"ops/{name}",
            "ops",
            lambda costs: compiling + 2 + costs.sizes.seconds / 10,
            partial(measurements.op, name=name),
        )
        for name in names
    ]


def _first_steps(sizes: Sizes, default: Variant) -> Iterator[Measurement]:
    sampled = Training(*sizes.report_sampling[0][:2])
    kinds: list[tuple[Kind, Training]] = [("train", sizes.report_training[0]), ("sample", sampled)]
    for kind, size in kinds:
        compiling = compiled(*size, kind == "train", default)

        def seconds(costs: Costs, compiling=compiling) -> float:
            states = (False, True)  # cold, then warm
            return 20 + sum(one.seconds(costs.kind, known) for one in compiling for known in states)

        run = partial(measurements.first, kind=kind, size=size)
        yield Measurement(f"first step/{kind}-{size.configuration}-batch{size.batch}", "first step", seconds, run)


def _scaling(sizes: Sizes, default: Variant) -> Iterator[Measurement]:
    scaling = sizes.scaling
    base = Sampling(scaling.configuration, scaling.batch, scaling.steps)
    varied = [("batch", n, base._replace(batch=n)) for n in scaling.batches]
    varied += [("steps", k, base._replace(steps=k)) for k in scaling.step_counts]
    for over, value, size in varied:
        run = partial(measurements.loop, size=size, variant=default, over=over, value=value)
        yield replace(_loop(size, default), name=f"scaling/{over}/{value}", group="scaling", run=run)
    for side in scaling.sides:
        growth = (side / CONFIGURATIONS[scaling.configuration].unet.height) ** 2
        yield replace(
            _loop(base._replace(batch=round(base.batch * growth)), default),
            name=f"scaling/image side/{side}",
            group="scaling",
            run=partial(measurements.image_size, size=base, side=side),
            compiles=compiled(f"{scaling.configuration} at {side} pixels", base.batch, False, default),
        )


def _first_figures(device: torch.device, sizes: Sizes) -> list[Measurement]:
    """Return what nine minutes must hold: is it right, how fast are sampling and training, where does the time go."""
    default, loops, trained = default_variant(device), sizes.report_sampling, sizes.report_training
    reference = _captured_references(device)
    return [
        Measurement("ceilings", "ceilings", lambda costs: 2 + costs.sizes.seconds, measurements.ceilings),
        _agreement(sizes.varied, default),
        *(_loop(size, default) for size in loops),
        *(_loop(loops[0], variant) for variant in reference),
        *(_training(size, default) for size in trained),
        *(_training(trained[0], variant) for variant in reference),
        _parts(Training(*loops[0][:2]), min(loops[0].steps, 2 * default.graph_steps), default),
        _parts(trained[0], 0, default),
    ]


def _captured_references(device: torch.device) -> list[Variant]:
    """Return what is as fast as it gets without kernels; a CPU captures nothing."""
    return [variant for variant in variants(device) if variant.mode == "captured" and not variant.kernels]


def _cudnn_benchmark(default: Variant, sizes: Sizes) -> list[Measurement]:
    timed = replace(default, cudnn_benchmark=True)
    return [_loop(sizes.report_sampling[0], timed), _training(sizes.report_training[0], timed)]


def _alternatives(device: torch.device, sizes: Sizes) -> list[Measurement]:
    """Return the other ways to run a loop and a training step, and the networks that matter less."""
    default, varied = default_variant(device), sizes.varied
    graphs = [replace(default, graph_steps=steps) for steps in GRAPH_STEPS if default.mode == "captured"]
    launched = [variant for variant in variants(device) if variant.mode != "captured" and variant != default]
    return [
        *(_loop(varied, variant) for variant in graphs),
        *(_loop(size, variant) for variant in _captured_references(device) for size in sizes.report_sampling[1:]),
        *(_loop(varied._replace(steps=min(varied.steps, EAGER_STEPS)), variant) for variant in launched),
        *(_training(sizes.report_training[0], variant) for variant in launched),
        *(_training(size, default) for size in sizes.more_training),
    ]


def plan(kind: str, sizes: Sizes, packages: Collection[str] = tuple(MODULES)) -> list[Measurement]:
    """Return all measurements, the most important first.

    Args:
        kind: of device, cuda or cpu.
        sizes: of what is measured.
        packages: of the peers, those that can be imported.
    """
    device = torch.device(kind)
    default = default_variant(device)
    ops = _ops(device, sizes.ops, sizes.norms)
    shipped, tuned = (_all_peers(device, sizes, packages, compiles) for compiles in (False, True))
    first, alternatives = _first_figures(device, sizes), _alternatives(device, sizes)
    last = [*_first_steps(sizes, default), *_scaling(sizes, default), *ops[HEAVIEST_OPS:]]
    if kind == "cpu":  # where compiling takes a minute each and pays for nobody
        return [*first, *shipped, *ops[:HEAVIEST_OPS], *last, *alternatives, *tuned]
    heaviest = [*_cudnn_benchmark(default, sizes), *ops[:HEAVIEST_OPS]]
    return [*first, *shipped, *heaviest, *tuned[:HEADLINES], *alternatives, *last, *tuned[HEADLINES:]]
