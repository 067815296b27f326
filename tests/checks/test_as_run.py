"""Captured and compiled steps against eager ones, with stand-ins that go wrong as real ones could."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_fast.checks.as_run import check_as_run
from ddpm_fast.checks.results import CheckResult
from ddpm_fast.config import Config, DiffusionConfig, TrainingConfig, UNetConfig
from ddpm_fast.engine.cuda_graphs import Work
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.trainer import Trainer

CONFIG = Config(
    unet=UNetConfig(1, 4, 4, 4, (1,), res_blocks=1, attention_resolutions=(), groups=2),
    diffusion=DiffusionConfig(10),
    training=TrainingConfig(batch_size=4, learning_rate=1e-3, warmup_steps=1000, precision="fp32"),
)


def batch(first: int, n: int) -> tuple[Tensor, Tensor]:
    number = torch.arange(first, first + n)
    return (number[:, None] * 37 + torch.arange(16) ** 2).to(torch.uint8).view(n, 1, 4, 4), number


class StandIn:
    """Replays by running the work, with something done before."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.before = before

    def warm_up(self, work: Work) -> None:
        work()

    def capture(self, work: Work) -> Work:
        def replay() -> None:
            self.before()
            work()

        return replay


def unusual(graphs: StandIn, config: Config = CONFIG) -> tuple[Trainer, list[CheckResult]]:
    trainer = Trainer(config, batch, torch.device("cpu"), Execution(captured=True), graphs)
    return trainer, [result for result in check_as_run(trainer, late=5000) if not result.passed]


def test_a_right_capture_passes_and_the_trainer_is_put_back():
    trainer, found = unusual(StandIn())
    assert found == []
    fresh = Trainer(CONFIG, batch, torch.device("cpu")).state()
    assert trainer.step == 0
    for part, tensors in trainer.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, fresh[part][name]), name


def test_bfloat16_is_held_to_its_own_rounding():
    low = replace(CONFIG, training=replace(CONFIG.training, precision="bf16"))
    assert unusual(StandIn(), low)[1] == []


def test_a_step_number_that_was_captured_is_found():
    """The learning rate and the average's decay then stay what they were in that step."""
    graphs = StandIn()
    trainer = Trainer(CONFIG, batch, torch.device("cpu"), Execution(captured=True), graphs)
    graphs.before = lambda: trainer.numbers.step.fill_(3)
    found = [result.name for result in check_as_run(trainer, late=5000) if not result.passed]
    assert found == [
        f"the way of the {part} in a captured step is that of an eager one" for part in ("weights", "averages")
    ]


def test_a_batch_that_was_captured_is_found():
    graphs = StandIn()
    trainer = Trainer(CONFIG, batch, torch.device("cpu"), Execution(captured=True), graphs)
    graphs.before = lambda: trainer.images.copy_(batch(12, 4)[0])
    assert not all(result.passed for result in check_as_run(trainer, late=5000))
