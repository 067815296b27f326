"""One model in many hands: threads at once, an exception or an interrupt in the middle, and the same images after."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_fast.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.engine.cuda_graphs import Work
from ddpm_fast.engine.execution import EAGER, Execution
from ddpm_fast.engine.sampling import SamplingLoop
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.errors import InputError
from ddpm_fast.options import LoadOptions, SamplingOptions
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.trained_model import Model

TINY = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=12, beta_end=0.6),
    data=DataConfig(data="digits"),
    training=TrainingConfig(steps=3, batch_size=4, device="cpu"),
)
SLOW = pytest.mark.slow
WANTED = [
    SamplingOptions("ddpm", 0, count=5, batch_size=2, seed=0),
    SamplingOptions("ddpm", 0, count=5, batch_size=2, seed=1),
    SamplingOptions("ddim", 6, count=5, batch_size=2, seed=0),
    SamplingOptions("ddim", 6, count=5, batch_size=2, seed=1),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reuse")
    trainer = Trainer(TINY, lambda first, n: pytest.fail("trained"), torch.device("cpu"))
    for weights in trainer.ema.values():
        torch.nn.init.normal_(weights, std=0.1, generator=torch.Generator().manual_seed(0))
    checkpoint.save(directory, 0, TINY, "", trainer.state())
    return directory


@pytest.fixture(scope="module")
def truth(run: Path) -> list[Tensor]:
    """What a model makes that is used once each time."""
    return [Model(run, LoadOptions(device="cpu")).draw(wanted) for wanted in WANTED]


@pytest.fixture
def model(run: Path) -> Model:
    return Model(run, LoadOptions(device="cpu"))


def test_threads_that_share_a_model_get_the_images_of_one_alone(model, truth):
    """They meet in the middle of each other's batches: who writes to another's buffers makes other images."""
    ready = threading.Barrier(4)

    def draw(wanted: SamplingOptions) -> list[Tensor]:
        ready.wait()
        return [model.draw(wanted) for _ in range(2)]

    with ThreadPoolExecutor(4) as threads:
        for made, expected in zip(threads.map(draw, WANTED), truth, strict=True):
            assert all(torch.equal(each, expected) for each in made)


def test_threads_that_load_a_model_each_get_its_images(run, truth):
    def draw(wanted: SamplingOptions) -> Tensor:
        return Model(run, LoadOptions(device="cpu")).draw(wanted)

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(draw, WANTED))
    assert all(torch.equal(each, expected) for each, expected in zip(made, truth, strict=True))


def test_streams_of_one_model_can_be_read_in_turn(model, truth):
    streams = [model.batches(wanted) for wanted in WANTED]
    batches = list(zip(*streams, strict=True))
    for made, expected in zip(zip(*batches, strict=True), truth, strict=True):
        assert torch.equal(torch.cat([x for _, x in made]), expected)


@pytest.mark.parametrize(
    "error", [pytest.param(ValueError, marks=SLOW), KeyboardInterrupt, pytest.param(MemoryError, marks=SLOW)]
)
def test_after_an_exception_in_on_step_the_images_are_the_same(model, truth, error):
    def fail(k: int, x: Tensor) -> None:
        if k == 3:
            x.fill_(torch.nan)
            raise error

    for wanted, expected in list(zip(WANTED, truth, strict=True))[::3]:
        with pytest.raises((error, InputError)):  # what says that memory is short ends in one line
            model.draw(wanted, on_step=fail)
        torch.testing.assert_close(model.draw(wanted), expected, rtol=0, atol=1e-5)


def test_on_step_may_not_sample_from_its_own_model_and_may_from_another(run, model, truth):
    with pytest.raises(InputError, match="load that a second time"):
        model.draw(WANTED[0], on_step=lambda k, x: model.draw(WANTED[0]))
    other, made = Model(run, LoadOptions(device="cpu")), list[Tensor]()
    found = model.draw(WANTED[0], on_step=lambda k, x: made.append(other.draw(WANTED[2])) if k == 1 else None)
    assert torch.equal(found, truth[0])
    assert torch.equal(made[0], truth[2])


class InterruptedOnce:
    """Stands in for CUDA graphs; the work that is numbered is interrupted in its middle."""

    def __init__(self, number: int) -> None:
        self.number, self.works = number, 0

    def _do(self, work: Work, then: Callable[[], None]) -> None:
        self.works += 1
        if self.works == self.number:
            work()
            raise KeyboardInterrupt
        then()

    def warm_up(self, work: Work) -> None:
        self._do(work, work)

    def capture(self, work: Work) -> Work:
        self._do(work, lambda: None)
        return work


@pytest.mark.parametrize("number", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_after_an_interrupt_in_a_capture_the_images_are_the_same(model, truth, monkeypatch, number):
    graphs = InterruptedOnce(number)  # in the warm-up, or the capture of one step, or of many
    monkeypatch.setattr("ddpm_fast.engine.sampling.CudaGraphs", lambda device: graphs)
    monkeypatch.setattr("ddpm_fast.runs.trained_model.choose_execution", lambda *a: Execution(captured=True))
    monkeypatch.setattr("ddpm_fast.runs.trained_model.SamplingLoop", partial(SamplingLoop, graph_steps=5))
    with pytest.raises(KeyboardInterrupt):
        model.draw(WANTED[0])
    assert torch.equal(model.draw(WANTED[0]), truth[0])
    assert torch.equal(model.draw(WANTED[1]), truth[1])


def test_after_an_interrupt_while_weights_are_exchanged_the_images_are_the_same(model, truth, monkeypatch):
    model.draw(WANTED[0])
    with monkeypatch.context() as patches:
        patches.setattr(type(model.loop.network), "_told", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.draw(WANTED[0])
    assert torch.equal(model.draw(WANTED[0]), truth[0])


def _interrupt(*arguments: object) -> Tensor:
    raise KeyboardInterrupt


def test_after_an_interrupt_in_a_step_or_its_capture_training_goes_on():
    graphs = InterruptedOnce(4)  # behind three warm-ups: the capture
    batch = _images
    made = Trainer(TINY, batch, torch.device("cpu"), Execution(captured=True), graphs)
    plain = Trainer(TINY, batch, torch.device("cpu"), EAGER)
    for _ in range(3):
        made.train_step_no_sync()
    losses = made._compiled_loss
    made._compiled_loss = lambda *batch: _interrupt()
    with pytest.raises(KeyboardInterrupt):
        made.train_step_no_sync()
    made._compiled_loss = losses
    assert (made.step, made.half_updated) == (3, False)
    for _ in range(2):
        made.train_step_no_sync()
    for _ in range(5):
        plain.train_step_no_sync()
    assert all(torch.equal(each, plain.ema[name]) for name, each in made.ema.items())


def _images(first: int, n: int) -> tuple[Tensor, Tensor]:
    number = torch.arange(first, first + n)
    return ((number.view(-1, 1, 1, 1) * 37 + torch.arange(64).view(1, 1, 8, 8)) % 256).to(torch.uint8), number
