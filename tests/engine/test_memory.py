"""Memory that does not suffice: the same steps and the same images, in smaller parts, whatever failed and where."""

import errno
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_fast.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    SamplerConfig,
    TrainingConfig,
    UNetConfig,
    with_training,
)
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.cuda_graphs import Work
from ddpm_fast.engine.execution import EAGER, Execution
from ddpm_fast.engine.memory import is_out_of_memory, until_it_fits
from ddpm_fast.engine.sampling import ImageRange, SamplingLoop, sample
from ddpm_fast.engine.trainer import WARM_UP_STEPS, Trainer
from ddpm_fast.errors import InputError, NotEnoughMemoryError

CPU = torch.device("cpu")
CONFIG = Config(
    unet=UNetConfig(1, 8, 8, channels=8, channel_multipliers=(1,), res_blocks=1, attention_resolutions=(), groups=4),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5),
    data=DataConfig(flip=True),
    training=TrainingConfig(steps=9, batch_size=12, learning_rate=1e-3, warmup_steps=0, precision="fp32"),
)
ON_A_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "40960000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = [ON_A_CPU, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")]


@pytest.mark.parametrize(
    "error",
    [
        *ERRORS,
        RuntimeError("std::bad_alloc"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_what_says_that_memory_did_not_suffice(error):
    assert is_out_of_memory(error)
    later = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    later.__context__ = error
    assert is_out_of_memory(later)


def test_other_errors_are_raised_at_once():
    def work() -> None:
        raise ValueError("allocate memory")

    with pytest.raises(ValueError, match="allocate memory"):
        until_it_fits(work, lambda: pytest.fail("tried with less"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class StandIn:
    """Repeats work as a CUDA graph would: what it captures is not run."""

    def __init__(self) -> None:
        self.captures = 0

    def warm_up(self, work: Work) -> None:
        work()

    def capture(self, work: Work) -> Work:
        self.captures += 1
        return work


def batch(first: int, n: int) -> tuple[Tensor, Tensor]:
    number = torch.arange(first, first + n)
    pixels = (number.view(-1, 1, 1, 1) * 37 + torch.arange(64).view(1, 1, 8, 8) * 5) % 256
    return pixels.to(torch.uint8), number


def trainer(execution: Execution = EAGER, **training: int) -> Trainer:
    graphs = StandIn() if execution.captured else None
    return Trainer(with_training(CONFIG, **training), batch, CPU, execution, graphs)


def fail_forwards(made: Trainer, most: int, error: Exception) -> None:
    losses = made._compiled_loss

    def fail(*batch: Tensor) -> Tensor:
        if len(batch[0]) > most:
            raise error
        return losses(*batch)

    made._compiled_loss = fail


def fail_backwards(made: Trainer, most: int, error: Exception) -> None:
    """Fail in the last part of a batch, once half of its gradients are there."""
    losses, names = made._compiled_loss, list(made.parameters)
    parts: list[int] = []

    def note(*batch: Tensor) -> Tensor:
        parts.append(len(batch[0]))
        return losses(*batch)

    def fail(gradient: Tensor) -> Tensor:
        if parts[-1] > most and parts.count(parts[-1]) * parts[-1] == made.config.training.batch_size:
            raise error
        return gradient

    made._compiled_loss = note
    made.parameters[names[len(names) // 2]].register_hook(fail)


def states(made: Trainer) -> dict[str, Tensor]:
    return {f"{part}.{name}": each.clone() for part, found in made.state().items() for name, each in found.items()}


@pytest.mark.parametrize("error", [ERRORS[0], *(pytest.param(error, marks=pytest.mark.slow) for error in ERRORS[1:])])
@pytest.mark.parametrize("fail", [fail_forwards, fail_backwards])
def test_a_step_that_does_not_fit_is_taken_in_smaller_parts(
    fail: Callable[[Trainer, int, Exception], None], error: Exception
):
    healed, whole, split = trainer(), trainer(), trainer(accumulate=4)
    healed.train_step_no_sync()
    for made in (whole, split):
        made.load_state(healed.step, healed.state())
        made.train_step_no_sync()
    fail(healed, 4, error)
    until_it_fits(healed.train_step_no_sync, healed.split_further)
    assert (healed.accumulate, healed.step, int(healed.numbers.updates)) == (4, 2, 2)
    in_parts, at_once = states(split), states(whole)
    for name, each in states(healed).items():
        assert torch.equal(each, in_parts[name]), name
        torch.testing.assert_close(each, at_once[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("of_a_capture", [False, True])
def test_a_captured_step_that_does_not_fit_is_captured_again(of_a_capture):
    made, eager, graphs = trainer(Execution(captured=True)), trainer(), StandIn()
    made.graphs, capture = graphs, graphs.capture

    def fail(work: Work) -> Work:
        if made.accumulate == 1:
            raise ON_A_CPU
        return capture(work)

    if of_a_capture:
        graphs.capture = fail
    else:
        fail_forwards(made, 6, ON_A_CPU)
    for _ in range(2 * WARM_UP_STEPS + 2):
        until_it_fits(made.train_step_no_sync, made.split_further)
        eager.train_step_no_sync()
    assert (made.accumulate, made.step, int(made.numbers.updates), graphs.captures) == (2, 8, 8, 1)
    assert not made.half_updated
    at_once = states(eager)
    for name, each in states(made).items():
        torch.testing.assert_close(each, at_once[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("size", "parts"), [(12, [2, 4, 12]), (7, [7]), (8, [2, 4, 8]), (1, [])])
def test_parts_stay_equal_until_they_are_one_image(size, parts):
    made, found = trainer(batch_size=size), []
    while made.split_further():
        found.append(made.accumulate)
    assert found == parts


def test_one_image_that_does_not_fit_is_one_line_and_the_last_step_stands():
    made = trainer()
    made.train_step_no_sync()
    before = states(made)
    fail_forwards(made, 0, ON_A_CPU)
    with pytest.raises(
        NotEnoughMemoryError, match=r"for one image at a time: take --precision bf16, a smaller network \(--channels"
    ):
        until_it_fits(made.train_step_no_sync, made.split_further)
    assert made.step == 1
    assert all(torch.equal(each, before[name]) for name, each in states(made).items())
    assert issubclass(NotEnoughMemoryError, InputError)  # exit status 2


def test_an_update_that_fails_is_never_taken_again(monkeypatch):
    made = trainer()

    def fail(*arguments: object) -> Tensor:
        raise ON_A_CPU

    monkeypatch.setattr("ddpm_fast.ops.reference.ema_decay_at", fail)  # Adam's moments have moved already
    with pytest.raises(NotEnoughMemoryError):
        until_it_fits(made.train_step_no_sync, made.split_further)
    assert made.half_updated
    assert made.accumulate == 1


@pytest.fixture
def loop() -> SamplingLoop:
    unet = Trainer(CONFIG, batch, CPU).unet
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return SamplingLoop(unet, sampler_table(CONFIG.diffusion, SamplerConfig("ddim", 4)))


@pytest.mark.parametrize(
    ("count", "largest", "most"), [(7, 7, 3), pytest.param(10, 4, 1, marks=pytest.mark.slow), (6, 64, 5), (5, 2, 2)]
)
def test_images_that_do_not_fit_are_made_in_smaller_batches(loop, capsys, count, largest, most):
    images, made = ImageRange(3, 17, count), list[int]()
    truth = sample(loop, images, largest)
    denoise = loop.functions.denoise

    def fail(x: Tensor, shifts: Tensor) -> Tensor:
        made.append(len(x))
        if len(x) > most:
            raise ON_A_CPU
        return denoise(x, shifts)

    loop.functions = loop.functions._replace(denoise=fail)
    torch.testing.assert_close(sample(loop, images, largest), truth, rtol=0, atol=1e-5)
    assert ("images are made" in capsys.readouterr().out) == (most < min(count, largest))
    made.clear()
    sample(loop, images, largest)
    assert max(made) <= most  # it is not tried again


def test_one_image_that_does_not_fit_into_sampling_is_one_line(loop):
    def fail(x: Tensor, shifts: Tensor) -> Tensor:
        raise ON_A_CPU

    loop.functions = loop.functions._replace(denoise=fail)
    with pytest.raises(NotEnoughMemoryError, match="even for one image at a time"):
        sample(loop, ImageRange(0, 0, 3))
