"""Each fault planted into a sampling loop is named by the right stage and file; a sound engine passes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.checks.sampling import QUICK_FLOP, check_loops
from ddpm_fast.checks.stand_in import affordable, perturb
from ddpm_fast.config import DiffusionConfig, UNetConfig
from ddpm_fast.engine import networks, sampling
from ddpm_fast.engine.execution import Execution
from ddpm_fast.model import blocks, unet
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import REFERENCE, reference
from ddpm_fast.presets import PRESETS
from tests.checks.planting import list_of_faults

UNET = UNetConfig(3, 4, 8, 4, (1, 2), res_blocks=1, attention_resolutions=(2,), dropout=0.3, groups=2)
DIFFUSION = DiffusionConfig(60, "cosine")
SCHEDULE, TABLE = "diffusion/schedule.py", "diffusion/samplers.py"
LOOP, OPS, MODEL = "engine/sampling.py", "ops/reference.py", "model/unet.py"
FAULTS, fault = list_of_faults()


def everything(diffusion: DiffusionConfig = DIFFUSION) -> Iterator[CheckResult]:
    torch.manual_seed(0)
    yield from check_loops(perturb(UNet(UNET)), diffusion)


def unusual(results: Iterator[CheckResult]) -> list[CheckResult]:
    return [result for result in results if not result.passed]


@pytest.mark.parametrize(
    ("prediction", "clip", "variance"), [("eps", False, "large"), ("x0", False, "small"), ("v", True, "large")]
)
def test_a_sound_engine_passes(prediction, clip, variance):
    diffusion = DiffusionConfig(40, "sigmoid", prediction=prediction, clip=clip, variance=variance)
    assert unusual(everything(diffusion)) == []


@pytest.mark.parametrize("timesteps", [1, 2])
def test_few_timesteps_pass(timesteps):
    assert unusual(everything(DiffusionConfig(timesteps, "cosine"))) == []


@fault("network", MODEL)
def t_one_too_high_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    build = networks.SampledNetwork.__init__
    monkeypatch.setattr(networks.SampledNetwork, "__init__", lambda self, u, t, dtype: build(self, u, t + 1, dtype))


@fault("network", MODEL)
def time_embedding_that_differs_in_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    shifts = UNet.time_shifts

    def differing(self, t, *label):
        return (1.0 if t.dtype == torch.int64 else 1.01) * shifts(self, t, *label)  # a table's t is a float

    monkeypatch.setattr(UNet, "time_shifts", differing)


@fault("network", MODEL)
def dropout_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, address = blocks.ResBlock.forward, unet.NoiseAddress(torch.zeros(2).long(), torch.arange(2))

    def dropping(self, x, shift, dropout_address=None, *skip):
        return forward(self, x, shift, dropout_address or address._replace(sample_index=torch.arange(len(x))), *skip)

    monkeypatch.setattr(blocks.ResBlock, "forward", dropping)


@fault("network", MODEL)
def weights_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "sampling_copy", lambda network, dtype: UNet(network.config).requires_grad_(False))


@fault("network", LOOP)
def new_weights_with_the_old_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    load = networks.SampledNetwork.load_weights

    def with_the_old(self, network):
        told = [values.clone() for values in self.told]
        load(self, network)
        self.told = told

    monkeypatch.setattr(networks.SampledNetwork, "load_weights", with_the_old)


@fault("sampler", LOOP)
def height_and_width_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    build = sampling.Buffers.__init__

    def turned(self, *given):
        build(self, *given)
        self.x = self.x.transpose(2, 3).contiguous(memory_format=torch.channels_last)
        self.x0 = None if self.x0 is None else torch.zeros_like(self.x)

    monkeypatch.setattr(sampling.Buffers, "__init__", turned)


def around_each_step(monkeypatch: pytest.MonkeyPatch, before: Callable[[Any], Any]) -> None:
    step = sampling.SamplingLoop.take_step

    def take(self, buffers, functions):
        before(buffers)
        step(self, buffers, functions)

    monkeypatch.setattr(sampling.SamplingLoop, "take_step", take)


@fault("sampler", LOOP)
def x0_not_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    around_each_step(monkeypatch, lambda buffers: buffers.x0 is not None and buffers.x0.zero_())


@fault("sampler", LOOP)
def rows_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    around_each_step(monkeypatch, lambda buffers: buffers.step.clamp_(max=4).add_(buffers.step == 2))


@fault("sampler", LOOP)
def x_changed_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    around_each_step(monkeypatch, lambda buffers: buffers.x.mul_(0.999))


@fault("sampler", LOOP)
def images_numbered_from_0_in_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    around_each_step(monkeypatch, lambda buffers: buffers.sample_index.copy_(torch.arange(len(buffers.x))))


@fault("sampler", LOOP)
def seeds_high_word_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    around_each_step(monkeypatch, lambda buffers: buffers.key[1:].zero_())


@fault("sampler", LOOP)
def result_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    run = sampling.SamplingLoop.run
    monkeypatch.setattr(sampling.SamplingLoop, "run", lambda self, *given: run(self, *given) * 0.5)


@fault("sampler", LOOP)
def batches_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = sampling.ImageRange.batches
    monkeypatch.setattr(sampling.ImageRange, "batches", lambda self, largest: batches(self, largest)[::-1])


def with_reverse_step(monkeypatch: pytest.MonkeyPatch, step: Callable[..., None]) -> None:
    monkeypatch.setattr("ddpm_fast.model.unet.REFERENCE", replace(REFERENCE, reverse_step=step))


@fault("sampler", OPS)
def clip_ignored_by_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    step = reference.reverse_step
    with_reverse_step(monkeypatch, lambda *given, clip, **options: step(*given, clip=False, **options))


@fault("sampler", OPS)
def noise_in_steps_that_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    step = reference.reverse_step

    def noisy(x, prediction, rows, *rest, **options):
        step(x, prediction, rows.clone().index_fill_(1, torch.tensor([7]), 0.5), *rest, **options)

    with_reverse_step(monkeypatch, noisy)


@fault("sampler", OPS)
def prediction_subtracted_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    step = reference.reverse_step
    with_reverse_step(monkeypatch, lambda x, out, *rest, **options: step(x, -out, *rest, **options))


@fault("sampler", OPS)
def values_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    step = reference.reverse_step

    def divided(x, *given, **options):
        step(x.div_(x - x), *given, **options)

    with_reverse_step(monkeypatch, divided)


@fault("sampler", OPS)
def x0_of_the_next_step_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    step = reference.reverse_step

    def unclipped(x, prediction, rows, at, *rest, x0=None, **options):
        step(x, prediction, rows, at, *rest, x0=x0, **options)
        if x0 is not None:
            x0.mul_(1.5)

    with_reverse_step(monkeypatch, unclipped)


@pytest.mark.parametrize(("plant", "stage", "file"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS])
def test_a_planted_fault_is_named(monkeypatch, plant, stage, file):
    plant(monkeypatch)
    first = next(result for result in everything() if result.verdict is Verdict.WRONG)
    assert first.stage == stage
    assert file in first.file


@pytest.mark.parametrize("updated", [True, False])
def test_the_low_precision_copy_is_checked(monkeypatch, updated):
    step = reference.reverse_step
    if not updated:
        with_reverse_step(monkeypatch, lambda *given, model_input=None, **options: step(*given, **options))
    results = list(check_loops(perturb(UNet(UNET)), DIFFUSION, torch.bfloat16))
    wrong = [result for result in results if not result.passed]
    assert [bool(wrong), all("rows in turn" in result.name for result in wrong)] == [not updated, True]


class Graphs:
    """Stands in for CUDA graphs, and leaves out some of the work that it captured."""

    def __init__(self, forgotten: int = 0) -> None:
        self.captured, self.forgotten = 0, forgotten

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return (lambda: None) if self.captured == self.forgotten else work


@pytest.mark.parametrize(("forgotten", "right"), [(0, True), (1, False), (2, False)])
def test_a_captured_loop_is_compared_as_a_whole(forgotten, right):
    """The second graph, of several steps, is none of those that the engine itself compares."""
    network = perturb(UNet(UNET))
    results = check_loops(network, DIFFUSION, execution=Execution(captured=True), graphs=Graphs(forgotten))
    last = list(results)[-1]
    assert (last.passed, last.file) == (right, "ddpm_fast/engine/sampling.py")


@pytest.mark.parametrize("name", PRESETS)
def test_a_reduced_network_has_the_structure_of_its_preset(name):
    config = PRESETS[name].unet
    with torch.device("meta"):
        small, whole = UNet(affordable(config, QUICK_FLOP)), UNet(config)
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in whole.named_parameters()]
    assert small.estimate_flop() <= QUICK_FLOP
