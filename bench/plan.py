"""What a visit measures, in order of importance; each with its name, its group and what it will cost."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from bench import measurements
from bench.engine import CONFIGURATIONS, Variant, default_variant, variants
from bench.first_step import Kind
from bench.op_work import builders
from bench.peers import OURS, Contender, contenders
from bench.sizes import Sampling, Training
from bench.visit import COMPILE_SECONDS, Measurement, Visit

EAGER_STEPS = 50
"""Of a sampling loop whose every step is launched from Python: enough to tell what a step costs."""

GRAPH_STEPS = (1, 100)
"""Steps in one captured graph, beside the engine's own choice."""


def _ceilings(visit: Visit) -> Iterator[Measurement]:
    yield Measurement("ceilings", "ceilings", lambda: 2 + visit.sizes.seconds, lambda: measurements.ceilings(visit))


def _ops(visit: Visit) -> Iterator[Measurement]:
    size = visit.sizes.ops
    compiling = 8.0 if visit.device.type == "cuda" else 0.0
    found = builders(CONFIGURATIONS[size.configuration], size.batch, visit.dtype, visit.clock, visit.sizes.norms)
    for name, build in found.items():
        cost = compiling + 2 + visit.sizes.seconds / 10
        yield Measurement(f"ops/{name}", "ops", lambda cost=cost: cost, partial(measurements.op, visit, build))


def _loop(visit: Visit, size: Sampling, variant: Variant) -> Measurement:
    if variant.mode == "eager" and visit.device.type == "cuda":
        size = size._replace(steps=min(size.steps, EAGER_STEPS))
    config = CONFIGURATIONS[size.configuration]
    return Measurement(
        f"loops/{size.configuration}-batch{size.batch}/{variant}",
        "loops",
        partial(visit.cost, config, size.batch, size.steps, False, variant),
        partial(measurements.loop, visit, size, variant),
    )


def _training(visit: Visit, size: Training, variant: Variant) -> Measurement:
    return Measurement(
        f"training/{size.configuration}-batch{size.batch}/{variant}",
        "training",
        partial(visit.cost, CONFIGURATIONS[size.configuration], size.batch, 1, True, variant),
        partial(measurements.training, visit, size, variant),
    )


def _parts(visit: Visit) -> Iterator[Measurement]:
    variant = default_variant(visit.device)
    sampled, trained = visit.sizes.report_sampling[-1], visit.sizes.report_training[0]
    if visit.device.type == "cuda":
        sampled = visit.sizes.report_sampling[0]
    sampling_steps = min(sampled.steps, 2 * default_variant(visit.device).graph_steps)
    for size, steps in ((Training(sampled.configuration, sampled.batch), sampling_steps), (trained, 0)):
        kind = "sampling" if steps else "train"
        yield Measurement(
            f"parts/{kind}-{size.configuration}-batch{size.batch}",
            "parts",
            partial(visit.cost, CONFIGURATIONS[size.configuration], size.batch, steps or 1, not steps, variant),
            partial(measurements.parts, visit, size, steps),
        )


def _peers(visit: Visit, size: Training, steps: int, who: list[Contender], suffix: str = "") -> Measurement:
    config, kind = CONFIGURATIONS[size.configuration], "sampling" if steps else "train"

    def cost() -> float:
        call = visit.step_seconds(config, size.batch, not steps) * (steps or 1)
        # Beside a peer that compiles, the engine on a GPU is compiled already: its cache is warm by then.
        compiling = COMPILE_SECONDS[visit.device.type] * (1 if steps else 2) * sum(one.compiles for one in who)
        return compiling + len(who) * (1 + 2 * call + max(visit.sizes.seconds, 3 * call))

    run = partial(measurements.peers, visit, size, steps, who)
    return Measurement(f"peers{suffix}/{kind}-{size.configuration}-batch{size.batch}", "peers", cost, run)


def _all_peers(visit: Visit, compiled: bool) -> Iterator[Measurement]:
    """Compare with those that start at once, or with those that compile, which take minutes and come apart."""
    who = [one for one in contenders(visit.device) if one.name == OURS or one.compiles == compiled]
    suffix = "-compiled" if compiled else ""
    for sampled in visit.sizes.peer_sampling:
        yield _peers(visit, Training(sampled.configuration, sampled.batch), sampled.steps, who, suffix)
    for trained in visit.sizes.peer_training:
        yield _peers(visit, trained, 0, who, suffix)


def _first_steps(visit: Visit) -> Iterator[Measurement]:
    size, sampled = visit.sizes.report_training[0], visit.sizes.report_sampling[0]
    compiling = COMPILE_SECONDS["cuda"] if visit.device.type == "cuda" else 0.0
    kinds: list[tuple[Kind, Training]] = [("train", size)]
    kinds.append(("sample", Training(sampled.configuration, sampled.batch)))
    for kind, one in kinds:
        cost = 25 + compiling * (2 if kind == "train" else 1)
        run = partial(measurements.first, visit, kind, one)
        name = f"first step/{kind}-{one.configuration}-batch{one.batch}"
        yield Measurement(name, "first step", lambda cost=cost: cost, run)


def _scaling(visit: Visit) -> Iterator[Measurement]:
    scaling, variant = visit.sizes.scaling, default_variant(visit.device)
    config = CONFIGURATIONS[scaling.configuration]
    base = Sampling(scaling.configuration, scaling.batch, scaling.steps)
    varied = [("batch", n, base._replace(batch=n)) for n in scaling.batches]
    varied += [("steps", k, base._replace(steps=k)) for k in scaling.step_counts]
    for over, value, size in varied:
        yield Measurement(
            f"scaling/{over}/{value}",
            "scaling",
            partial(visit.cost, config, size.batch, size.steps, False, variant),
            partial(measurements.loop, visit, size, variant, over=over, value=value),
        )
    for side in scaling.sides:
        growth = (side / config.unet.height) ** 2
        yield Measurement(
            f"scaling/image side/{side}",
            "scaling",
            lambda growth=growth: visit.cost(config, round(base.batch * growth), base.steps, False, variant),
            partial(measurements.image_size, visit, base, side),
        )


def plan(visit: Visit) -> list[Measurement]:
    """Return all measurements of a visit, the most important first."""
    offered, default = variants(visit.device), default_variant(visit.device)
    others = [variant for variant in offered if variant != default]
    cheap = [variant for variant in others if variant.mode == "eager" or visit.device.type == "cuda"]
    dear = [variant for variant in others if variant not in cheap]  # on a CPU compiling takes a minute and more
    loops, trained = visit.sizes.report_sampling, visit.sizes.report_training
    graphs = [replace(default, graph_steps=steps) for steps in GRAPH_STEPS if default.mode == "captured"]
    compiled_peers = list(_all_peers(visit, compiled=True))
    on_gpu = visit.device.type == "cuda"
    return [
        *_ceilings(visit),
        *_ops(visit),
        *(_loop(visit, size, default) for size in loops),
        *(_loop(visit, loops[0], variant) for variant in [*cheap, *graphs]),
        *(_training(visit, size, default) for size in trained),
        *(_training(visit, trained[0], variant) for variant in cheap),
        *_parts(visit),
        *_all_peers(visit, compiled=False),
        *(compiled_peers if on_gpu else []),
        *_first_steps(visit),
        *_scaling(visit),
        *(_loop(visit, size, variant) for variant in dear for size in loops[:1]),
        *([] if on_gpu else compiled_peers),
    ]
