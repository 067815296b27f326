"""Configurations of any values: each is refused in a sentence, or builds; tiny ones train, save, load and sample."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_fast import api
from ddpm_fast.cli.arguments import SampleArguments
from ddpm_fast.config import CheckConfig, Config, DataConfig, DiffusionConfig, SamplerConfig, TrainingConfig, UNetConfig
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.diffusion.schedule import training_table
from ddpm_fast.errors import InputError
from ddpm_fast.flags import from_dict, to_dict
from ddpm_fast.model.unet import UNet
from ddpm_fast.options import LoadOptions, SamplingOptions, StartOptions
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.directory import find_start
from ddpm_fast.runs.run import Run
from tests.checks.valid_configurations import make
from tests.fuzz.amounts import often
from tests.fuzz.mutations import ANYTHING, NUMBERS, exchanged
from tests.refusals import refused

PARTS = (UNetConfig, DiffusionConfig, DataConfig, TrainingConfig, SamplerConfig, CheckConfig)
OPTIONS = (SamplingOptions, LoadOptions, StartOptions, SampleArguments)
SMALL = st.integers(-1, 9) | st.sampled_from([16, 32, 64, 100, 1000])


def values_of(field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """Return a field's values: mostly of its type and often valid, sometimes anything."""
    kind: Any = field.type
    if hasattr(kind, "__metadata__"):  # Annotated, with what tyro needs
        kind = get_args(kind)[0]
    if get_args(kind) and get_origin(kind) is tuple:
        choices = get_args(get_args(kind)[0])
        entries = st.sampled_from(choices) if choices else SMALL
        meant: st.SearchStrategy[Any] = st.lists(entries, max_size=4).map(tuple)
    elif get_origin(kind) is UnionType:  # a number, or "auto"
        meant = SMALL | st.just("auto")
    elif get_args(kind):
        meant = st.sampled_from(get_args(kind))
    elif kind is int:
        meant = SMALL
    elif kind is float:
        meant = st.floats(0, 1) | SMALL
    elif kind is bool:
        meant = st.booleans()
    else:
        meant = st.text(max_size=8)
    default = [] if field.default is dataclasses.MISSING else [st.just(field.default)] * 3
    return st.one_of(*default, meant, meant, NUMBERS | ANYTHING)


def any_of(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    """Return keywords for a dataclass: up to six of its fields, the others as they are by default."""
    fields = {field.name: values_of(field) for field in dataclasses.fields(cls)}
    return st.lists(st.sampled_from(sorted(fields)), max_size=6, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )


@pytest.mark.parametrize("cls", [*PARTS, *OPTIONS], ids=lambda cls: cls.__name__)
@often(fast=25, slow=200)
def test_any_values_are_a_configuration_or_a_sentence(cls, examples):
    count = [0, 0]

    @examples
    @given(any_of(cls))
    def check(keywords: dict[str, Any]) -> None:
        count[bool(refused(lambda: cls(**keywords)))] += 1

    check()
    assert min(count) > 0, count


@often(fast=25, slow=300)
def test_what_is_valid_builds_and_has_its_tables(examples):
    built = []

    @examples
    @given(any_of(UNetConfig), any_of(DiffusionConfig), any_of(SamplerConfig))
    def check(unet: dict[str, Any], diffusion: dict[str, Any], sampler: dict[str, Any]) -> None:
        try:
            network, process, wanted = UNetConfig(**unet), DiffusionConfig(**diffusion), SamplerConfig(**sampler)
        except InputError:
            return
        with torch.device("meta"):
            UNet(network)
        table = training_table(process)
        assert len(table) == process.timesteps
        assert bool(table.isfinite().all())
        if not refused(lambda: sampler_table(process, wanted)):
            assert bool(sampler_table(process, wanted).rows.isfinite().all())
        built.append(network)

    check()
    assert len(built) > 3


@often(fast=60, slow=400)
def test_json_of_any_types_is_a_configuration_or_a_sentence(examples, tmp_path):
    values = json.loads(json.dumps(to_dict(make(3, tmp_path))))

    @examples
    @given(exchanged(values))
    def check(other: Any) -> None:
        refused(lambda: from_dict(other))

    check()


TINY = st.builds(
    lambda number, heads, details, variance: (number, heads, details, variance),
    st.integers(0, 10**6),
    st.sampled_from([0, 1]),
    st.sampled_from(["paper", "diffusers"]),
    st.sampled_from(["small", "large"]),
)


@often(fast=1, slow=6)
def test_what_is_valid_trains_saves_loads_and_makes_the_same_images_twice(examples):
    @examples
    @given(TINY)
    def check(drawn: tuple[int, int, Any, Any]) -> None:
        number, heads, details, variance = drawn
        directory = Path(tempfile.mkdtemp())
        try:
            (directory / "data").mkdir()
            config = small(make(number, directory / "data"), heads, details, variance)
            dataset = open_dataset(config.data, config.unet)
            out = directory / "run"
            Run(out, config, dataset, find_start(out, config, dataset.fingerprint, False), progress=False).train()
            found = checkpoint.newest_whole(out)
            assert found is not None
            assert (found.step, found.config) == (1, config)
            images = [sampled(out) for _ in range(2)]
            assert images[0].shape == (2, config.unet.image_channels, config.unet.height, config.unet.width)
            assert torch.equal(*images)
            assert bool(images[0].isfinite().all())
        finally:
            shutil.rmtree(directory)

    check()


def small(config: Config, heads: int, details: Any, variance: Any) -> Config:
    """Return a configuration that takes one step on at most eight images of at most 16 pixels."""
    unet = config.unet
    height, width = (min(side, 2 ** (len(unet.channel_multipliers) - 1) * 2) for side in (unet.height, unet.width))
    unet = dataclasses.replace(
        unet, height=height, width=width, attention_resolutions=(height,), head_channels=heads, details=details
    )
    parts = config.training.accumulate
    training = dataclasses.replace(config.training, steps=1, batch_size=2 * parts, warmup_steps=0, sample_every=0)
    diffusion = dataclasses.replace(config.diffusion, variance=variance)
    return dataclasses.replace(config, unet=unet, training=training, diffusion=diffusion)


def sampled(run: Path) -> torch.Tensor:
    model = api.load(run, device="cpu")
    steps = min(3, model.config.diffusion.timesteps)
    return model.sample(2, sampler="ddpm", steps=steps, return_tensor=True, progress=False)
