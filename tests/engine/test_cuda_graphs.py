"""Captured loops and steps, with a stand-in for CUDA graphs: what is replayed, when, and that it computes the same.

The stand-in records what a graph would: a capture does not run the work, a replay does, from the same tensors. What
only a GPU can show (that nothing is allocated or waited for) is marked `gpu`.
"""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ddpm_fast.config import Config, DiffusionConfig, SamplerConfig, UNetConfig, with_training
from ddpm_fast.diffusion.noise import NoiseAddress, key_from_seed
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.cuda_graphs import InFlight, Work
from ddpm_fast.engine.execution import Execution, can_compile_for_cpu
from ddpm_fast.engine.sampling import GRAPH_STEPS, MOST_BUFFERS, ImageRange, SamplingLoop, sample, stream
from ddpm_fast.engine.trainer import WARM_UP_STEPS, Trainer
from ddpm_fast.errors import MathematicsError
from ddpm_fast.model.unet import UNet
from ddpm_fast.presets import PRESETS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPTURED = Execution(captured=True)
DIFFUSION = DiffusionConfig(timesteps=2 * GRAPH_STEPS + 5, beta_end=0.2)
UNET = UNetConfig(3, 8, 4, channels=8, channel_multipliers=(1, 2), res_blocks=1, attention_resolutions=(4,), groups=4)


class StandIn:
    """Counts what real graphs would do, and replays by running the work."""

    def __init__(self) -> None:
        self.warm_ups = self.captures = 0
        self.replays: list[int] = []

    def warm_up(self, work: Work) -> None:
        self.warm_ups += 1
        work()

    def capture(self, work: Work) -> Work:
        number = self.captures
        self.captures += 1

        def replay() -> None:
            self.replays.append(number)
            work()

        return replay


@pytest.fixture(autouse=True)
def deterministic_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep cuDNN from algorithms whose bits vary from run to run: here bits are compared."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(UNET)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet.to(DEVICE).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def captured_loop(unet: UNet, sampler: SamplerConfig | None = None) -> tuple[SamplingLoop, StandIn]:
    graphs = StandIn()
    return SamplingLoop(
        unet, sampler_table(DIFFUSION, sampler or SamplerConfig()), execution=CAPTURED, graphs=graphs
    ), graphs


@pytest.mark.parametrize("sampler", [SamplerConfig(), SamplerConfig("ddim", 7), SamplerConfig("dpm++", GRAPH_STEPS)])
def test_the_captured_loop_makes_the_eager_loops_images(unet, sampler):
    eager = SamplingLoop(unet, sampler_table(DIFFUSION, sampler))
    captured, _ = captured_loop(unet, sampler)
    for seed, count in ((3, 4), (4, 2), (5, 4)):  # another seed, another batch size, and back
        images = ImageRange(seed, 7, count)
        assert torch.equal(sample(captured, images), sample(eager, images))


def test_whole_graphs_are_replayed_and_the_rest_by_single_steps(unet):
    captured, graphs = captured_loop(unet)
    captured.buffers(2)
    assert (graphs.warm_ups, graphs.captures) == (1, 2)
    graphs.replays.clear()
    sample(captured, ImageRange(0, 0, 2))
    assert graphs.replays == [1, 1, 0, 0, 0, 0, 0]
    graphs.replays.clear()
    list(stream(captured, ImageRange(0, 0, 2), on_step=lambda k, x: None))  # who looks at every step gets every step
    assert graphs.replays == [0] * len(captured.rows)


def test_a_graph_has_as_many_steps_as_asked_for(unet):
    graphs = StandIn()
    captured = SamplingLoop(unet, sampler_table(DIFFUSION), execution=CAPTURED, graphs=graphs, graph_steps=30)
    captured.buffers(2)
    graphs.replays.clear()
    sample(captured, ImageRange(0, 0, 2))
    assert graphs.replays == [1] + [0] * (len(captured.rows) - 30)


def test_graphs_are_reused_and_the_oldest_freed(unet):
    captured, graphs = captured_loop(unet, SamplerConfig("ddim", 2))
    for _ in range(2):
        sample(captured, ImageRange(0, 0, 3), largest_batch=2)  # two batches, the last one padded
        assert graphs.captures == 1
    for images in range(3, 3 + MOST_BUFFERS):
        captured.buffers(images)
    assert 2 not in captured.buffers_by_size
    assert len(captured.buffers_by_size) == MOST_BUFFERS


def test_a_captured_loop_that_differs_is_refused(unet):
    captured, _ = captured_loop(unet)
    right = captured.functions.denoise
    captured.functions = captured.functions._replace(denoise=lambda x, shifts: right(x, shifts) * 1.5)
    with pytest.raises(MathematicsError, match="differs from the eager one"):
        captured.buffers(2)


def test_weights_can_be_exchanged_under_a_captured_loop(unet):
    other = UNet(UNET)
    torch.manual_seed(1)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    other = other.to(DEVICE).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    captured, graphs = captured_loop(unet, SamplerConfig("ddim", 5))
    before = sample(captured, ImageRange(0, 0, 2))
    captured.load_weights(other)
    fresh, _ = captured_loop(other, SamplerConfig("ddim", 5))
    assert torch.equal(sample(captured, ImageRange(0, 0, 2)), sample(fresh, ImageRange(0, 0, 2)))
    captured.load_weights(unet)
    assert torch.equal(sample(captured, ImageRange(0, 0, 2)), before)
    assert graphs.captures == 1


def test_sampling_in_bfloat16_stays_near_float32(unet):
    """The bound is measured: 0.015 of the images' own size on this network; convolutions accumulate in float32."""
    table = sampler_table(DIFFUSION, SamplerConfig("ddim", 5))
    exact, coarse = (
        sample(SamplingLoop(unet, table, dtype), ImageRange(0, 0, 2)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0 < float((coarse - exact).norm() / exact.norm()) < 0.05


def test_progress_counts_every_step_once():
    seen: list[int] = []
    launched = InFlight(torch.device("cpu"), seen.append)
    for steps in (20, 20, 1):
        launched.add(steps)
    launched.finish()
    assert seen == [20, 20, 1]


def configuration() -> Config:
    config = Config("mine", UNET, DIFFUSION, PRESETS["cifar10"].data, PRESETS["cifar10"].training)
    return with_training(config, batch_size=4, accumulate=2, warmup_steps=5, learning_rate=1e-3, precision="fp32")


def batch(first: int, n: int) -> tuple[Tensor, Tensor]:
    number = torch.arange(first, first + n, device=DEVICE)
    pixel = torch.arange(96, device=DEVICE).view(1, 8, 4, 3)
    return ((number.view(-1, 1, 1, 1) * 37 + pixel * 5) % 256).to(torch.uint8).permute(0, 3, 1, 2), number


def losses(trainer: Trainer, steps: int = 2 + WARM_UP_STEPS) -> list[float]:
    found = []
    for _ in range(steps):
        trainer.train_step_no_sync()
        found += [trainer.read_loss(), *map(float, trainer.figures[:2])]
    return found + [float(average.sum()) for average in trainer.ema.values()]


@pytest.mark.slow
@pytest.mark.skipif(not can_compile_for_cpu(), reason="PyTorch has nothing to compile for a CPU with")
def test_compiled_training_takes_the_eager_steps_and_can_be_cached():
    counters.clear()
    trainer = Trainer(configuration(), batch, DEVICE, Execution(compiled=True))
    assert losses(trainer) == pytest.approx(losses(Trainer(configuration(), batch, DEVICE)), rel=1e-3, abs=1e-3)
    assert counters["aot_autograd"]["total"] == 1
    assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
    trainer.numbers.bad_step.fill_(0)
    trainer.parameters["mid_block.resnets.0.conv1.weight"].data.fill_(float("nan"))
    assert "mid_block.resnets.0.conv1" in trainer.locate_nonfinite()  # by hooks, which compiled code does not call


def test_captured_training_takes_the_eager_steps():
    graphs = StandIn()
    captured = losses(Trainer(configuration(), batch, DEVICE, CAPTURED, graphs))
    assert captured == losses(Trainer(configuration(), batch, DEVICE))
    assert (graphs.warm_ups, graphs.captures, graphs.replays) == (WARM_UP_STEPS, 1, [0, 0])


def test_a_captured_step_reads_nothing_from_the_host():
    """What a step is told lies on the device: another number there changes a replay, though Python's does not."""
    trainer = Trainer(configuration(), batch, DEVICE, CAPTURED, StandIn())
    trainer.load_batch()
    trainer._device_step()
    trainer.numbers.step.fill_(1)
    trainer._device_step()
    assert float(trainer.figures.learning_rate) == pytest.approx(1e-3 * 2 / 5)
    assert trainer.step == 0


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [CAPTURED, Execution(True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_ten_captured_calls_equal_the_eager_ones(unet, execution, dtype):
    table = sampler_table(DIFFUSION, SamplerConfig())
    eager, captured = SamplingLoop(unet, table, dtype), SamplingLoop(unet, table, dtype, execution)
    for seed in range(10):
        images = ImageRange(seed, seed, 1 + seed % 2)  # each batch size is compiled
        ours, theirs = sample(captured, images), sample(eager, images)
        # Bit-identical where the same kernels run; compiled ones round otherwise.
        assert torch.equal(ours, theirs) or (execution.compiled and (ours - theirs).abs().mean() < 1 / 255)


@pytest.mark.gpu
def test_on_a_gpu_replays_neither_wait_nor_allocate(unet):
    captured = SamplingLoop(unet, sampler_table(DIFFUSION, SamplerConfig()), execution=CAPTURED)
    address = NoiseAddress(key_from_seed(0, DEVICE), torch.arange(4, device=DEVICE))
    captured.run(address)
    before = torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.run(address)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_reserved() == before


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [CAPTURED, Execution(True, False), Execution(True, True)], ids=str)
def test_on_a_gpu_every_layer_gives_the_same_losses(execution):
    config = configuration()
    eager = losses(Trainer(config, batch, DEVICE))
    assert losses(Trainer(config, batch, DEVICE, execution)) == pytest.approx(eager, rel=1e-3, abs=1e-3)
