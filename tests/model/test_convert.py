"""Published configurations, as their files say, are the U-Nets and processes of the paper's presets."""

import dataclasses

import pytest

from ddpm_fast.config import DiffusionConfig, SamplerConfig, UNetConfig
from ddpm_fast.diffusion.convert import process_and_sampler, scheduler_fields
from ddpm_fast.errors import InputError
from ddpm_fast.model.convert import unet_config, unet_fields
from ddpm_fast.presets import PRESETS

COMMON = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
LEVELS_256 = ["DownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]
PUBLISHED = {
    # google/ddpm-cifar10-32
    "cifar10": COMMON
    | {
        "sample_size": 32,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    # google/ddpm-celebahq-256, ddpm-cat-256, ddpm-church-256 and ddpm-bedroom-256
    "celebahq256": COMMON
    | {
        "sample_size": 256,
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": LEVELS_256,
        "up_block_types": [block.replace("Down", "Up") for block in reversed(LEVELS_256)],
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_the_presets(name):
    expected = dataclasses.replace(PRESETS[name].unet, dropout=0.0)
    assert unet_config(PUBLISHED[name], "config.json") == expected
    fields = unet_fields(expected)
    assert {key: fields[key] for key in fields if key in PUBLISHED[name]} == {
        key: PUBLISHED[name][key] for key in fields if key in PUBLISHED[name]
    }
    assert unet_config(fields, "config.json") == expected


def test_what_train_unconditional_of_diffusers_builds_can_be_expressed():
    """examples/unconditional_image_generation/train_unconditional.py names sizes and blocks, and leaves the rest."""
    fields = {
        key: PUBLISHED["celebahq256"][key] for key in ("block_out_channels", "down_block_types", "up_block_types")
    }
    found = unet_config({**fields, "sample_size": 64}, "config.json")
    assert found == UNetConfig(
        3, 64, 64, 128, (1, 1, 2, 2, 4, 4), 2, (4,), groups=32, head_channels=8, details="diffusers"
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_a_process_survives_its_schedulers_fields(schedule, sampler):
    process = DiffusionConfig(400, schedule, prediction="x0", variance="small", clip=False)
    sampling = SamplerConfig(sampler, spacing="leading")
    found, visited = process_and_sampler(scheduler_fields(process, sampling), "scheduler_config.json")
    assert found == process
    assert (visited.sampler, visited.spacing) == (sampler, "leading")


def test_a_sampler_that_no_scheduler_equals_is_refused():
    with pytest.raises(InputError, match="no equal"):
        scheduler_fields(DiffusionConfig(), SamplerConfig("ddim", 20, spacing="linspace"))
