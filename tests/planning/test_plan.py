"""Plans as a table: unlike data on unlike machines, each a configuration that fits, in time and in memory."""

from dataclasses import replace

import pytest
import torch

from ddpm_fast.config import DataConfig
from ddpm_fast.data.survey import Facts
from ddpm_fast.engine.speed import Machine
from ddpm_fast.errors import InputError
from ddpm_fast.flags import changed_flags
from ddpm_fast.model.unet import UNet
from ddpm_fast.options import Wanted
from ddpm_fast.planning import cost
from ddpm_fast.planning.plan import MEMORY_SHARE, MINUTES, PLANNED, needed_images, plan, remarks
from ddpm_fast.presets import AUTO, PRESETS


def facts(count: int, side: int, grey: bool = False, transparent: bool = False) -> Facts:
    return Facts(count, (side, side, side), (side, side, side), side, grey, transparent)


FOLDERS = {
    "tiny grey digits": facts(1797, 8, grey=True),
    "emoji": facts(1590, 64, transparent=True),
    "photos of 12 megapixels": facts(1000, 3000),
    "200 images": facts(200, 480),
    "a million": facts(10**6, 256),
}
MACHINES = {
    "two cores": Machine("cpu", 6e9, 1.5e11),
    "8 GB": Machine("cuda", 7.5e9, 3e13),
    "80 GB": Machine("cuda", 79e9, 3e14),
}
EXPECTED = {  # channels, height, width of images; channels of the U-Net
    ("tiny grey digits", "two cores"): (1, 8, 8, 32),
    ("emoji", "two cores"): (3, 32, 32, 16),
    ("photos of 12 megapixels", "two cores"): (3, 32, 32, 16),
    ("200 images", "two cores"): (3, 32, 32, 16),
    ("a million", "two cores"): (3, 32, 32, 16),
    ("tiny grey digits", "8 GB"): (1, 8, 8, 32),
    ("emoji", "8 GB"): (3, 64, 64, 48),
    ("photos of 12 megapixels", "8 GB"): (3, 64, 64, 32),
    ("200 images", "8 GB"): (3, 32, 32, 16),  # which 400,000 sights of them can teach
    ("a million", "8 GB"): (3, 96, 96, 64),
    ("tiny grey digits", "80 GB"): (1, 8, 8, 32),
    ("emoji", "80 GB"): (3, 64, 64, 48),
    ("photos of 12 megapixels", "80 GB"): (3, 64, 64, 32),
    ("200 images", "80 GB"): (3, 32, 32, 16),
    ("a million", "80 GB"): (3, 192, 192, 64),
}


@pytest.mark.parametrize(("folder", "machine"), EXPECTED)
def test_a_plan_fits_its_images_and_its_machine(folder, machine):
    images, here = FOLDERS[folder], MACHINES[machine]
    config = plan(images, here, DataConfig("photos"), Wanted())
    unet, training = config.unet, config.training
    assert (unet.image_channels, unet.height, unet.width, unet.channels) == EXPECTED[folder, machine]
    assert max(unet.height, unet.width) <= images.side
    assert changed_flags(AUTO, config).keys() <= {*PLANNED, "data"}
    assert cost.seconds(config, here) <= 60 * MINUTES[here.kind] * 1.001
    part = training.batch_size // training.accumulate
    assert cost.memory(unet, part, here.kind) <= MEMORY_SHARE * here.memory
    assert training.steps * training.batch_size <= 2000 * images.count
    assert training.steps >= 1000
    assert 0.9 * needed_images(unet) <= training.steps * training.batch_size
    assert training.warmup_steps < training.cooldown_start
    assert 0.99 < training.ema_decay < 0.9999


def test_more_time_makes_a_longer_run_or_a_larger_one():
    costs = []
    for minutes in (1, 3, 10, 30, 100, 300, 1000):
        config = plan(FOLDERS["emoji"], MACHINES["two cores"], DataConfig("x"), Wanted(), minutes)
        costs.append((config.unet.height, cost.flop_per_image(config.unet)))
        assert 0.8 * 60 * minutes < cost.seconds(config, MACHINES["two cores"]) <= 60 * minutes * 1.001
    assert costs == sorted(costs)
    assert costs[0][0] < 32
    assert costs[-1][0] == 48


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(height=64, width=64),
        Wanted(height=48),
        Wanted(height=30, width=50),
        Wanted(height=7),
        Wanted(channels=20),
        Wanted(channels=200, image_channels=4),
        Wanted(channel_multipliers=(1, 3)),
        Wanted(attention_resolutions=()),
        Wanted(res_blocks=3, groups=2),
        Wanted(steps=2, batch_size=6),
        Wanted(batch_size=90, accumulate=3),
    ],
)
def test_what_the_user_fixes_stays_and_the_rest_fits_it(wanted):
    config = plan(FOLDERS["emoji"], MACHINES["two cores"], DataConfig("x"), wanted)
    for part in (config.unet, config.training):
        for name, value in vars(part).items():
            fixed = getattr(wanted, name, None)
            assert fixed is None or value == fixed
    if wanted.height and not wanted.width:
        assert config.unet.width == wanted.height


@pytest.mark.slow
def test_a_plans_numbers_are_short_enough_to_be_read():
    for steps in range(1, 300):
        made = plan(FOLDERS["emoji"], MACHINES["two cores"], DataConfig("x"), Wanted(steps=steps))
        assert len(str(made.training.ema_decay)) <= len("0.9999")


def test_flags_that_cannot_go_together_are_refused_by_their_names():
    with pytest.raises(InputError, match=r"--channels 20.*--groups"):
        plan(FOLDERS["emoji"], MACHINES["8 GB"], DataConfig("x"), Wanted(channels=20, groups=32))
    with pytest.raises(InputError, match="--height is 0: it must be at least 1"):
        Wanted(height=0)


def test_a_batch_too_large_for_the_memory_is_taken_in_parts():
    small = replace(MACHINES["two cores"], memory=2e9)
    config = plan(FOLDERS["emoji"], small, DataConfig("x"), Wanted(height=64, width=64, batch_size=96))
    parts = config.training.accumulate
    assert parts > 1
    assert 96 % parts == 0
    assert cost.memory(config.unet, 96 // parts, "cpu") <= MEMORY_SHARE * 2e9
    fewer = max(part for part in range(1, parts) if 96 % part == 0)
    assert cost.memory(config.unet, 96 // fewer, "cpu") > MEMORY_SHARE * 2e9


def test_what_is_needed_agrees_with_the_runs_that_were_looked_at():
    """Images that they saw, and what was seen of them: good digits; every second one; no emoji to be recognized."""
    assert 22_400 <= needed_images(PRESETS["digits"].unet) < 2 * 22_400
    assert needed_images(PRESETS["mnist"].unet) >= 2 * 32_000
    assert needed_images(PRESETS["icons32"].unet) > 3 * 48_000
    emoji = replace(PRESETS["icons32"].unet, height=20, width=20, channel_multipliers=(1, 2), attention_resolutions=())
    assert needed_images(emoji) > 2 * 31_000


def test_remarks_name_what_a_plan_cannot_know():
    few = plan(FOLDERS["200 images"], MACHINES["two cores"], DataConfig("x"), Wanted(height=256, width=256))
    said = " ".join(remarks(few, replace(FOLDERS["200 images"], transparent=True)))
    for word in ("will be rough", "256x256 pixels take about", "--holdout", "--image-channels 4", "--flip"):
        assert word in said
    flipped = replace(few, data=DataConfig("x", flip=True), unet=replace(few.unet, image_channels=4))
    said = " ".join(remarks(flipped, replace(FOLDERS["200 images"], transparent=True)))
    assert "--flip" not in said
    assert "--image-channels" not in said


def test_what_a_gradient_keeps_is_what_pytorch_keeps():
    """Held to the tensors that autograd saves in a real pass on a CPU, whose own norm keeps less than the reference."""
    unet = plan(FOLDERS["tiny grey digits"], MACHINES["two cores"], DataConfig("x"), Wanted()).unet
    network, kept = UNet(unet), {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    image = torch.rand(3, unet.image_channels, unet.height, unet.width)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = network(image, torch.arange(3))
    assert result.requires_grad
    assert 1 <= cost.kept_bytes(unet)[1] / (sum(kept.values()) / 3) < 1.7
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert cost.kept_bytes(unet)[0] / parameters == cost.BYTES_PER_PARAMETER
