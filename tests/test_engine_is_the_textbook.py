"""The engine against the textbook: the same losses, weights, averages and images from the same weights and noise.

The textbook runs in float64, so that all rounding is the engine's. Weights are the initial ones with 0.1 * randn added:
branches that begin near zero would hide their faults (attention without its scale changes a loss by 7e-6 there).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_fast import textbook
from ddpm_fast.checks.tables import visited
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, SamplerConfig, TrainingConfig, UNetConfig
from ddpm_fast.diffusion.noise import (
    NoiseAddress,
    Stream,
    example_word,
    key_from_seed,
    normal,
    random_timesteps,
    random_words_below,
)
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.engine.execution import EAGER, Execution, can_compile_for_cpu, set_tf32
from ddpm_fast.engine.sampling import ImageRange, SamplingLoop, sample
from ddpm_fast.engine.trainer import BatchFunction, Trainer
from ddpm_fast.ops import REFERENCE, fused_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (3, 8, 8)
UNET = UNetConfig(*SHAPE, 8, (1, 2), res_blocks=1, attention_resolutions=(4,), dropout=0.25, groups=4)
SMALL = replace(UNET, channel_multipliers=(1,), attention_resolutions=())  # attends in its middle all the same
IMAGES = ImageRange(seed=3, first=17, count=2)


class TrainingNumbers:
    """The engine's random numbers for training, by the names of torch's functions."""

    def __init__(self, seed: int) -> None:
        self.key, self.sample_index = key_from_seed(seed), torch.empty(0, dtype=torch.int64)

    @property
    def address(self) -> NoiseAddress:
        return NoiseAddress(self.key, self.sample_index)

    def rand(self, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:  # of timesteps
            return (example_word(self.address, Stream.TIMESTEP).double() + 0.5) / 2**32
        # The engine mirrors where a word lies in the upper half, the textbook where a number lies in the lower.
        return 1 - (example_word(self.address, Stream.FLIP).double() + 0.5).view(shape) / 2**32

    def randint(self, high: int, shape: tuple[int]) -> Tensor:
        return random_timesteps(self.address, high).view(shape)

    def bernoulli(self, probabilities: Tensor) -> Tensor:  # of withholding a label
        return (example_word(self.address, Stream.LABEL).double() / 2**32 < probabilities.double()).double()

    def randn(self, shape: tuple[int, int, int, int]) -> Tensor:
        return normal(self.address, 0, Stream.TRAINING, shape[1:], torch.float64)


class SamplingNumbers:
    """The engine's random numbers for sampling: x_T, then the noise of one step after the other."""

    def __init__(self, images: ImageRange) -> None:
        self.address, self.step = NoiseAddress(key_from_seed(images.seed), images.first + torch.arange(images.count)), 0

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        self.step += 1
        return normal(self.address, self.step - 1, Stream.SAMPLING, SHAPE, torch.float64).view(shape)


class AddressedDropout(nn.Module):
    """Dropout of what the engine drops in its `layer`-th ResBlock."""

    def __init__(self, probability: float, layer: int, numbers: TrainingNumbers) -> None:
        super().__init__()
        self.probability, self.layer, self.numbers = probability, layer, numbers

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape, threshold = (x.shape[1], x.shape[2], x.shape[3]), int(self.probability * 2**32)
        dropped = random_words_below(self.numbers.address, self.layer, Stream.DROPOUT, shape, threshold)
        return x.masked_fill(dropped, 0) / (1 - self.probability)


@dataclass(frozen=True)
class AotEager(Execution):
    """Compiled to PyTorch's own ops: all that a compiler does but to generate code, which takes minutes."""

    def compile(self, function: Callable[..., Any]) -> Any:
        return torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager")


def batch(first: int, n: int) -> tuple[Tensor, Tensor]:
    """Return images that differ from each other and from their mirror images, and their numbers."""
    number, pixel = torch.arange(first, first + n, device=DEVICE), torch.arange(3 * 8 * 8, device=DEVICE)
    images = (number[:, None] * 37 + pixel * 5 + pixel**2 * number[:, None] % 61) % 256
    return images.to(torch.uint8).view(n, 8, 8, 3).permute(0, 3, 1, 2), number


SETTINGS = {
    # alpha_bar ends at 0.2. Down to 1e-5, as in "v", it would make 1e-2 of rounding within 50 steps of DDIM: by the
    # division in x_start = (x_t - ...) / sqrt(alpha_bar), and by clipping, which keeps x small, but not its error.
    "eps": (DiffusionConfig(100, beta_end=0.03), TrainingConfig(warmup_steps=0)),
    "v": (
        DiffusionConfig(100, "cosine", prediction="v"),
        TrainingConfig(warmup_steps=5, clip_norm=0.3, min_snr_gamma=5, accumulate=2),
    ),
    "x0": (
        DiffusionConfig(100, "sigmoid", prediction="x0"),
        TrainingConfig(warmup_steps=0, clip_norm=0, min_snr_gamma=1, timestep_density="laplace"),
    ),
}


def configuration(prediction: str, unet: UNetConfig = UNET, **changes: Any) -> Config:
    diffusion, training = SETTINGS[prediction]
    training = replace(training, batch_size=4, learning_rate=1e-3, ema_decay=0.6, precision="fp32")
    return Config(unet=unet, diffusion=diffusion, data=DataConfig(flip=True), training=replace(training, **changes))


def batches_of(config: Config) -> BatchFunction:
    """Return `batch`, with labels of 3 classes in no simple order for a conditional U-Net."""
    return (lambda first, n: (*batch(first, n), batch(first, n)[1] ** 2 % 7 % 3)) if config.unet.classes else batch


def engine(config: Config, kernels: bool = False, execution: Execution = EAGER) -> Trainer:
    set_tf32("fp32")
    trainer, generator = Trainer(config, batches_of(config), DEVICE, execution), torch.Generator().manual_seed(0)
    trainer.unet.use(fused_ops() if kernels else REFERENCE)
    with torch.no_grad():
        for parameter in trainer.unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(DEVICE))
    return trainer


def textbook_unet(config: UNetConfig, weights: Mapping[str, Tensor], numbers: TrainingNumbers) -> textbook.UNet:
    unet = textbook.UNet(config)
    unet.load_state_dict(weights)
    levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    for layer, block in enumerate(block for level in levels for block in level.resnets):
        block.dropout = AddressedDropout(config.dropout, layer, numbers)
    return unet.double()


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    """Return all weights side by side, but for the keys' biases.

    Those shift all scores of a softmax alike: their gradients are rounding, of which Adam makes steps of full size.
    """
    names = sorted(name for name in weights if not name.endswith("to_k.bias"))
    return torch.cat([weights[name].detach().double().cpu().flatten() for name in names])


def assert_moved_alike(ours: Mapping[str, Tensor], truth: nn.Module, start: Tensor, bound: float) -> None:
    """Compare how far weights have come from their start, by the length of the way."""
    way = flat(truth.state_dict()) - start
    assert float((flat(ours) - start - way).norm()) < bound * float(way.norm())


def assert_trains_as_the_textbook(trainer: Trainer, steps: int = 20, first_step: int = 0) -> None:
    """Compare each loss, the moving average after each step, and the weights in the end.

    At a learning rate of 1e-3 rounding does not grow within 20 steps: measured on a CPU, losses differ by 2e-7 of
    themselves, averages by 1e-6 of their way and weights, which Adam moves by almost the sign of a gradient, by 2e-5.
    """
    config, numbers = trainer.config, TrainingNumbers(trainer.config.training.seed)
    trainer.step, n = first_step, config.training.batch_size
    unet = textbook_unet(config.unet, trainer.unet.state_dict(), numbers)
    ema = textbook_unet(config.unet, trainer.ema, numbers)
    start, ema_start = flat(unet.state_dict()), flat(ema.state_dict())

    def batches() -> Iterator[tuple[Any, ...]]:
        for step in range(first_step, first_step + steps):
            images, sample_index, *labels = batches_of(config)(step * n, n)
            numbers.sample_index = sample_index.cpu()
            yield step, images.cpu(), *(each.cpu() for each in labels)

    for loss in textbook.train(unet, ema, batches(), config, numbers):
        trainer.train_step_no_sync()
        assert trainer.read_loss() == pytest.approx(loss, rel=1e-5), f"step {trainer.step - 1}"
        # Late in a run an average moves by 1e-3 of its distance to the weights, beside which float32 is coarse.
        assert_moved_alike(trainer.ema, ema, ema_start, 1e-3 if first_step else 1e-5)
    assert_moved_alike(trainer.parameters, unet, start, 1e-4)


@pytest.mark.parametrize("prediction", SETTINGS)
def test_training_is_the_textbooks(prediction):
    assert_trains_as_the_textbook(engine(configuration(prediction)))


COOLING: dict[str, Any] = {"steps": 20, "warmup_steps": 5, "cooldown": 0.4, "adam_beta2": 0.95}
RATES = [n / 5 for n in range(1, 5)] + [1.0] * 8 + [n / 8 for n in range(8, 0, -1)]
"""Of those 20 steps, as shares of the learning rate: 5 of warm-up, 7 in full, and 8 of cooldown, the first in full."""


def test_training_with_a_cooldown_and_another_beta2_is_the_textbooks(monkeypatch):
    trainer, ours, theirs = engine(configuration("v", **COOLING)), list[float](), list[float]()
    step_of_ours, step_of_theirs = trainer.train_step_no_sync, torch.optim.Adam.step

    def take_ours() -> None:
        step_of_ours()
        ours.append(float(trainer.figures.learning_rate))

    def take_theirs(self: torch.optim.Adam) -> None:
        theirs.append(self.param_groups[0]["lr"])
        step_of_theirs(self)

    monkeypatch.setattr(trainer, "train_step_no_sync", take_ours)
    monkeypatch.setattr(torch.optim.Adam, "step", take_theirs)
    assert_trains_as_the_textbook(trainer)
    assert theirs == pytest.approx([1e-3 * share for share in RATES], rel=1e-15)
    assert ours == pytest.approx([1e-3 * share for share in RATES], rel=1e-7)


def test_training_late_in_a_run_is_the_textbooks():
    assert_trains_as_the_textbook(engine(configuration("v", ema_decay=0.999)), steps=3, first_step=20_000)


def test_training_with_kernels_is_the_textbooks():
    pytest.importorskip("triton")
    images, steps = (4, 20) if DEVICE.type == "cuda" else (1, 2)  # Triton's interpreter takes a second per image
    config = configuration("v", batch_size=images, accumulate=1, **COOLING)
    assert_trains_as_the_textbook(engine(config, kernels=True), steps, first_step=COOLING["steps"] - steps)


@pytest.mark.slow
def test_compiled_training_is_the_textbooks():
    assert_trains_as_the_textbook(engine(configuration("v", SMALL), execution=AotEager(compiled=True)))


def assert_samples_as_the_textbook(
    config: Config, sampler: SamplerConfig, kernels: bool = False, execution: Execution = EAGER
) -> None:
    unet, table = engine(config, kernels).unet, sampler_table(config.diffusion, sampler)
    images = sample(SamplingLoop(unet, table, execution=execution), IMAGES)
    network = textbook_unet(config.unet, unet.state_dict(), TrainingNumbers(0)).eval()
    assert_are_the_textbooks(images.double(), network, config.diffusion, sampler)


def assert_are_the_textbooks(images: Tensor, network: Any, diffusion: DiffusionConfig, sampler: SamplerConfig) -> None:
    """Compare images with those that the textbook makes by a network, by their largest value."""
    process = textbook.ForwardProcess(diffusion, visited(diffusion.timesteps, sampler))
    random = SamplingNumbers(IMAGES)
    x = random.randn(images.shape)
    if sampler.sampler == "ddpm":
        x = textbook.sample_ddpm(network, x, process, random)
    elif sampler.sampler == "ddim":
        x = textbook.sample_ddim(network, x, process, sampler.eta, random)
    else:
        x = textbook.sample_dpm_solver(network, x, process)
    assert float((images - x).abs().max()) < 1e-5 * float(x.abs().max())


SAMPLERS = {
    "ddpm": SamplerConfig("ddpm"),
    "ddim": SamplerConfig("ddim"),
    "ddim-eta": SamplerConfig("ddim", eta=0.7, spacing="leading"),
    "dpm++": SamplerConfig("dpm++", spacing="linspace"),
}


def sampling(prediction: str, clip: bool, timesteps: int = 100, unet: UNetConfig = UNET) -> Config:
    config = configuration(prediction, unet)
    variance = "small" if clip else "large"
    return replace(config, diffusion=replace(config.diffusion, timesteps=timesteps, clip=clip, variance=variance))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("prediction", "clip"), [("eps", False), ("v", True), ("x0", False)])
def test_sampling_in_50_steps_is_the_textbooks(prediction, clip, name):
    timesteps = 50 if name == "ddpm" else 100  # the paper's visits all of them
    assert_samples_as_the_textbook(sampling(prediction, clip, timesteps), replace(SAMPLERS[name], steps=50))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_sampling_in_few_clipped_steps_is_the_textbooks(prediction, name):
    assert_samples_as_the_textbook(sampling(prediction, True), replace(SAMPLERS[name], steps=7))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "dpm++"])
def test_sampling_with_kernels_is_the_textbooks(name):
    pytest.importorskip("triton")
    sampler = replace(SAMPLERS[name], steps=50 if DEVICE.type == "cuda" else 3)
    assert_samples_as_the_textbook(sampling("v", True), sampler, kernels=True)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile_for_cpu(), reason="PyTorch has nothing to compile for a CPU with")
def test_compiled_sampling_is_the_textbooks():
    sampler, model = replace(SAMPLERS["dpm++"], steps=50), sampling("v", True, unet=SMALL)
    assert_samples_as_the_textbook(model, sampler, execution=Execution(compiled=True))
