"""The configuration: bad values are refused in one line that teaches, good ones survive a round trip."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from ddpm_fast import config, flags, presets
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, SamplerConfig, TrainingConfig, UNetConfig
from ddpm_fast.errors import MEANT, InputError, flag
from ddpm_fast.options import LoadOptions, SamplingOptions
from ddpm_fast.presets import PRESETS

# dataclass, field, bad value, and what the message must say beside the field and the value
BAD = [
    (UNetConfig, "image_channels", 0, "at least 1"),
    (UNetConfig, "height", 33, "use 32"),
    (UNetConfig, "width", 30, "use 32"),
    (UNetConfig, "height", -8, "at least 1"),
    (UNetConfig, "channels", 100, "32 groups: change --channels or --groups"),
    (UNetConfig, "groups", 48, "change --channels or --groups"),
    (UNetConfig, "channel_multipliers", (), "name one multiplier per level"),
    (UNetConfig, "channel_multipliers", (1, 0), "must be positive"),
    (UNetConfig, "res_blocks", 0, "at least 1"),
    (UNetConfig, "attention_resolutions", (15,), "[32, 16, 8, 4]"),
    (UNetConfig, "dropout", 1.0, "[0, 1)"),
    (UNetConfig, "dropout", -0.1, "[0, 1)"),
    (DiffusionConfig, "timesteps", 0, "at least 1"),
    (DiffusionConfig, "beta_start", 0.0, "0 < start <= end < 1"),
    (DiffusionConfig, "beta_end", 1.0, "0 < start <= end < 1"),
    (DiffusionConfig, "beta_end", 1e-5, "0 < start <= end < 1"),
    (TrainingConfig, "steps", 0, "at least 1"),
    (TrainingConfig, "batch_size", -1, "at least 1"),
    (TrainingConfig, "accumulate", 3, "does not divide"),
    (TrainingConfig, "log_every", 0, "at least 1"),
    (TrainingConfig, "save_every", 0, "at least 1"),
    (TrainingConfig, "sample_every", -1, "not be negative"),
    (TrainingConfig, "evaluate_every", -1, "not be negative"),
    (TrainingConfig, "evaluate_count", 1, "at least 2 samples"),
    (TrainingConfig, "warmup_steps", -1, "not be negative"),
    (TrainingConfig, "cooldown", -0.1, "[0, 1]"),
    (TrainingConfig, "cooldown", 1.1, "[0, 1]"),
    (TrainingConfig, "adam_beta2", 0.0, "(0, 1)"),
    (TrainingConfig, "adam_beta2", 1.0, "(0, 1)"),
    (TrainingConfig, "clip_norm", -1.0, "not be negative"),
    (TrainingConfig, "min_snr_gamma", -1.0, "not be negative"),
    (TrainingConfig, "learning_rate", 0.0, "must be positive"),
    (TrainingConfig, "learning_rate", float("nan"), "must be finite"),
    (TrainingConfig, "ema_decay", 1.0, "[0, 1)"),
    (TrainingConfig, "seed", -1, "0..2**64-1"),
    (TrainingConfig, "seed", 2**64, "0..2**64-1"),
]


@pytest.mark.parametrize(("cls", "field", "value", "remedy"), BAD)
def test_bad_value_is_refused_in_one_line_with_field_value_and_remedy(cls, field, value, remedy):
    with pytest.raises(InputError) as caught:
        cls(**{field: value})
    message = str(caught.value)
    assert "\n" not in message
    assert flag(field) in message
    assert remedy in message
    for part in value if isinstance(value, tuple) else (value,):
        assert str(part) in message


@pytest.mark.parametrize("cls", [UNetConfig, DiffusionConfig, TrainingConfig])
def test_not_a_number_is_refused_in_every_float_field(cls):
    for field in dataclasses.fields(cls):
        if field.type is float:
            with pytest.raises(InputError, match=flag(field.name)):
                cls(**{field.name: float("nan")})


def test_the_help_names_every_preset():
    text = Path(config.__file__).read_text()
    (sentence,) = [line for line in text.splitlines() if "What gives other flags' defaults" in line]
    assert re.findall(r"[\w-]+", sentence.partition(":")[2].replace(" or ", " ")) == [*PRESETS, "auto"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    values = json.loads(json.dumps(flags.to_dict(PRESETS[name])))
    assert flags.from_dict(values) == PRESETS[name]
    assert flags.from_dict(flags.to_dict(PRESETS[name])) == PRESETS[name]
    assert PRESETS[name].preset == name


def test_every_field_survives_a_round_trip_when_it_is_not_the_default():
    how = ("laplace", 2**64 - 1, "cpu", "bf16", False, False, False, True)
    changed = Config(
        "mine",
        UNetConfig(4, 24, 40, 48, (1, 2, 3), 3, (12, 6), 0.25, 16, 24, "diffusers", 10),
        DiffusionConfig(77, "sigmoid", 0.001, 0.03, "v", "small", False),
        config.DataConfig("pictures", "0..1", True, True, 0.25, "scan", "kind", "8820dfd"),
        TrainingConfig(7, 12, 3, 1e-3, 5, 0.2, 0.99, 0.5, 0.9, 5.0, 0.3, *how, 3, 4, 0.5, 5, 6, 7, 8, 9, "runs/1"),
        config.CheckConfig(("ema", "sampler"), True),
        SamplerConfig("dpm++", 20, 0.5, "leading"),
    )
    default = Config()
    for part in dataclasses.fields(Config)[1:]:
        for field in dataclasses.fields(getattr(changed, part.name)):
            here, there = (getattr(getattr(c, part.name), field.name) for c in (changed, default))
            assert here != there, f"{part.name}.{field.name} is not tried: give it a value here"
    assert flags.from_dict(json.loads(json.dumps(flags.to_dict(changed)))) == changed


@pytest.mark.parametrize(("part", "key", "suggestion"), [("unet", "chanels", "channels"), ("training", "sed", "seed")])
def test_unknown_key_is_refused_and_the_nearest_suggested(part, key, suggestion):
    values = flags.to_dict(Config())
    values[part][key] = 1
    with pytest.raises(InputError, match=f"unknown configuration key '{key}'. Did you mean '{suggestion}'"):
        flags.from_dict(values)
    with pytest.raises(InputError, match=r"unknown configuration key 'trainin'. Did you mean 'training'"):
        flags.from_dict({"trainin": {}})


def test_a_configuration_of_before_samplers_were_part_of_it_has_the_papers():
    values = flags.to_dict(Config(sampling=SamplerConfig("ddim", 50)))
    assert flags.from_dict(values).sampling == SamplerConfig("ddim", 50)
    del values["sampling"]
    assert flags.from_dict(values) == Config()


def test_the_sampler_is_no_flag():
    """Its steps are not training's: no keyword, no difference between two runs."""
    quick = Config(sampling=SamplerConfig("dpm++", 20))
    assert flags.with_flags(quick, {"steps": 7}).sampling.steps == 20
    assert flags.with_flags(quick, {"steps": 7}).training.steps == 7
    with pytest.raises(InputError, match="unknown keyword 'sampler'"):
        flags.with_flags(quick, {"sampler": "ddim"})
    assert flags.changed_flags(Config(), quick) == {}
    assert flags.changed_flags(quick, config.with_training(quick, steps=7)) == {"steps": (800_000, 7)}


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({}, SamplerConfig("dpm++", 20, spacing="linspace")),
        ({"steps": 9}, SamplerConfig("dpm++", 9, spacing="linspace")),
        ({"sampler": "dpm++"}, SamplerConfig("dpm++", 100)),
        ({"sampler": "ddpm"}, SamplerConfig("ddpm", 100)),
        ({"sampler": "ddim", "steps": 9, "eta": 0.5}, SamplerConfig("ddim", 9, 0.5)),
    ],
)
def test_a_sampler_that_is_left_out_is_the_runs_own(asked, meant):
    own = Config(diffusion=DiffusionConfig(100), sampling=SamplerConfig("dpm++", 20, spacing="linspace"))
    assert SamplingOptions(**asked).sampler_for(own) == meant
    without = Config(diffusion=DiffusionConfig(100))
    assert SamplingOptions().sampler_for(without) == SamplerConfig("ddpm", 100)
    few = dataclasses.replace(own, diffusion=DiffusionConfig(10))
    assert SamplingOptions().sampler_for(few).steps == 10


def test_a_part_that_is_no_object_is_refused():
    with pytest.raises(InputError, match="configuration key 'unet' is 3, not an object"):
        flags.from_dict({"unet": 3})
    with pytest.raises(InputError, match=r"the configuration is \[\], not an object"):
        flags.from_dict([])


@pytest.mark.parametrize(
    ("cls", "field", "value", "says"),
    [
        (UNetConfig, "height", "tall", "a whole number"),
        (UNetConfig, "height", 8.0, "a whole number"),
        (UNetConfig, "height", True, "a whole number"),
        (UNetConfig, "channel_multipliers", 2, "whole numbers"),
        (UNetConfig, "channel_multipliers", (1, 2.0), "whole numbers"),
        (UNetConfig, "dropout", "0.1", "a number"),
        (DiffusionConfig, "schedule", "cosin", "'linear', 'cosine', 'sigmoid'. Did you mean 'cosine'?"),
        (DiffusionConfig, "clip", 1, "true or false"),
        (DataConfig, "data", None, "text"),
        (TrainingConfig, "device", "gpu", "'auto', 'cpu', 'cuda'. Did you mean 'cuda'?"),
        (SamplerConfig, "sampler", "dpm", "Did you mean 'dpm++'?"),
        (SamplingOptions, "count", 0, "must lie in 1..4294967296"),
        (SamplingOptions, "count", "4", "a whole number"),
        (SamplingOptions, "first_index", 2**32, "must lie in 0..4294967295"),
        (SamplingOptions, "batch_size", 0, "must lie in 1.."),
        (SamplingOptions, "seed", -1, "0..2**64-1"),
        (LoadOptions, "weights", "mean", "'ema', 'raw'"),
    ],
)
def test_wrong_types_and_choices_are_refused_in_one_line(cls, field, value, says):
    with pytest.raises(InputError, match=re.escape(f"{flag(field)} is {value!r}: it must ")) as caught:
        cls(**{field: value})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_reach_the_part_that_they_belong_to():
    values = {"height": 64, "channel_multipliers": [1, 2, 4], "data": Path("photos"), "seed": 4}
    changed = flags.with_flags(Config(), values)
    assert changed.unet == UNetConfig(height=64, channel_multipliers=(1, 2, 4))
    assert (changed.data, changed.training) == (DataConfig("photos"), TrainingConfig(seed=4))
    assert flags.with_flags(Config(), {}) == Config()


@pytest.mark.parametrize(("name", "meant"), [("lr", "learning_rate"), ("batchsize", "batch_size"), ("gpus", "device")])
def test_unknown_flags_are_refused_and_the_nearest_suggested(name, meant):
    with pytest.raises(InputError, match=rf"unknown keyword '{name}'. Did you mean '{meant}'\?"):
        flags.with_flags(Config(), {name: 1})
    with pytest.raises(InputError, match=r"unknown keyword 'zzz'.$"):
        flags.with_flags(Config(), {"zzz": 1})


def test_every_synonym_stands_for_something_that_there_is():
    classes = (UNetConfig, DiffusionConfig, DataConfig, TrainingConfig, SamplingOptions)
    fields = [f for cls in classes for f in dataclasses.fields(cls)]
    choices = [choice for f in fields for choice in typing.get_args(f.type) if isinstance(choice, str)]
    known = {flag(f.name)[2:] for f in fields} | {"out", "resume"} | set(choices)
    assert {name for names in MEANT.values() for name in names.split()} <= known


def test_bad_value_inside_a_saved_configuration_is_refused():
    values = flags.to_dict(Config())
    values["unet"]["height"] = 33
    with pytest.raises(InputError, match="height 33"):
        flags.from_dict(values)


@pytest.mark.parametrize(
    ("name", "suggestion"), [("digts", "digits"), ("cifar-10", "cifar10"), ("church", "church256")]
)
def test_unknown_preset_is_refused_and_the_nearest_suggested(name, suggestion):
    with pytest.raises(InputError, match=f"unknown preset '{name}'.*Did you mean '{suggestion}'"):
        presets.preset(name)
    with pytest.raises(InputError, match="the presets are digits, mnist, icons32, cifar10") as caught:
        presets.preset("zzz")
    assert "Did you mean" not in str(caught.value)


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert config.with_training(Config(), steps=3).training == dataclasses.replace(TrainingConfig(), steps=3)
