"""Sampling: the same image whatever the batch, and exactly the rows of the table."""

import pytest
import torch

from ddpm_fast.config import DiffusionConfig, SamplerConfig, UNetConfig
from ddpm_fast.diffusion.noise import NoiseAddress, Stream, key_from_seed, normal
from ddpm_fast.diffusion.samplers import Row, sampler_table
from ddpm_fast.engine.execution import Execution, can_compile_for_cpu
from ddpm_fast.engine.sampling import ImageRange, SamplingLoop, sample, stream
from ddpm_fast.errors import MathematicsError
from ddpm_fast.model.unet import UNet

DIFFUSION = DiffusionConfig(timesteps=30, beta_end=0.3)
CONFIG = UNetConfig(3, 8, 4, channels=8, channel_multipliers=(1, 2), res_blocks=1, attention_resolutions=(4,), groups=4)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    for parameter in unet.parameters():  # not the near-zero start: the network must matter
        torch.nn.init.normal_(parameter, std=0.1)
    return unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def loop(unet: UNet, name: str = "ddpm", steps: int = 0) -> SamplingLoop:
    return SamplingLoop(unet, sampler_table(DIFFUSION, SamplerConfig(name, steps)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 0), ("ddim", 7), ("dpm++", 7)])
def test_an_image_is_the_same_at_any_batch_size_and_start(unet, name, steps):
    made = sample(loop(unet, name, steps), ImageRange(3, 0, 10), largest_batch=10)
    for first, count, largest in ((0, 10, 3), (7, 1, 64), (4, 5, 2)):
        part = sample(loop(unet, name, steps), ImageRange(3, first, count), largest)
        assert part.shape == (count, 3, 8, 4)
        assert float((part - made[first : first + count]).abs().max()) < 1 / 255
    assert not torch.equal(made, sample(loop(unet, name, steps), ImageRange(4, 0, 10), 10))


@pytest.mark.slow
@pytest.mark.skipif(not can_compile_for_cpu(), reason="PyTorch has nothing to compile for a CPU with")
@pytest.mark.parametrize("name", ["ddpm", "dpm++"])
def test_the_compiled_loop_makes_the_eager_loops_images(unet, name):
    table = sampler_table(DIFFUSION, SamplerConfig(name, 12))
    compiled = SamplingLoop(unet, table, execution=Execution(compiled=True))
    for seed in (3, 4):
        images = ImageRange(seed, 7, 4)
        made = sample(compiled, images)
        assert not torch.equal(made, sample(compiled, ImageRange(seed + 1, 7, 4)))
        assert float((made - sample(SamplingLoop(unet, table), images)).abs().max()) < 1 / 255


def test_images_are_bit_identical_in_batches_of_one_shape(unet):
    whole = sample(loop(unet), ImageRange(3, 0, 8), largest_batch=4)
    part = sample(loop(unet), ImageRange(3, 3, 4), largest_batch=4)
    assert torch.equal(whole[3:7], part)


def test_what_is_there_is_left_out_and_the_rest_is_bit_identical(unet):
    whole = sample(loop(unet), ImageRange(3, 0, 10), largest_batch=4)
    there = {0, 1, 2, 3, 5, 8, 9}  # of batches 0..3, 4..7 and 8..9
    ((first, rest),) = stream(loop(unet), ImageRange(3, 0, 10, there), 4)
    assert first == 4
    assert torch.equal(rest, whole[4:8])
    assert list(stream(loop(unet), ImageRange(3, 0, 10, range(10)), 4)) == []


def test_batches_come_as_they_are_made(unet):
    made = []
    batches = stream(loop(unet, "ddim", 2), ImageRange(0, 3, 5), 2, on_step=lambda k, x: made.append(k))
    assert next(batches)[0] == 3
    assert made == [0, 1]  # the steps of one batch
    assert [(first, len(x)) for first, x in batches] == [(5, 2), (7, 1)]


def test_batches_are_equal_and_padded_past_the_end():
    assert [b.tolist() for b in ImageRange(0, 5, 7).batches(3)] == [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    assert [len(b) for b in ImageRange(0, 0, 65).batches(64)] == [33, 33]
    assert [len(b) for b in ImageRange(0, 0, 2).batches(64)] == [2]


def test_the_loop_is_the_papers_algorithm_2(unet):
    """Written out in float64 from betas alone, with the noise taken from its address."""
    made = sample(loop(unet), ImageRange(1, 0, 2), 2).double()
    betas = torch.linspace(DIFFUSION.beta_start, DIFFUSION.beta_end, 30, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    address = NoiseAddress(key_from_seed(1), torch.arange(2))
    x = normal(address, 0, Stream.SAMPLING, (3, 8, 4)).double()
    with torch.no_grad():
        for k, t in enumerate(reversed(range(30))):
            eps = unet(x.float(), torch.full((2,), t)).double()
            x_start = ((x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()).clamp(-1, 1)
            before = alpha_bar[t - 1] if t else torch.tensor(1.0).double()
            mean = before.sqrt() * betas[t] * x_start + (1 - betas[t]).sqrt() * (1 - before) * x
            x = mean / (1 - alpha_bar[t])
            if t:
                x = x + betas[t].sqrt() * normal(address, k + 1, Stream.SAMPLING, (3, 8, 4)).double()
    torch.testing.assert_close(made, x, rtol=0, atol=2e-4)


def test_the_time_embedding_is_computed_once_for_all_steps(unet):
    made = loop(unet, "ddim", 5)
    t = made.table.rows[:, Row._fields.index("t")]
    torch.testing.assert_close(made.network.told[0], unet.time_shifts(t.float()), rtol=0, atol=0)
    assert made.network.told[0].shape[0] == 5


def test_every_step_is_reported(unet):
    seen: list[int] = []
    for _ in stream(loop(unet, "ddim", 4), ImageRange(0, 0, 3), 2, on_step=lambda k, x: seen.append(k)):
        pass
    assert seen == [0, 1, 2, 3] * 2


def test_a_value_that_is_not_finite_is_refused(unet):
    broken = UNet(CONFIG)
    torch.nn.init.constant_(broken.conv_out.weight, float("nan"))
    with pytest.raises(MathematicsError, match="not finite"):
        sample(loop(broken, "ddim", 2), ImageRange(0, 0, 1), 1)
