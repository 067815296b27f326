"""A run that starts with another model's weights: its own at step 0, and what it may not change of them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm_fast import api
from ddpm_fast.config import Config, DataConfig, DiffusionConfig, SamplerConfig, TrainingConfig, UNetConfig
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.model.unet import UNet
from ddpm_fast.options import StartOptions
from ddpm_fast.planning.start import starting_config
from ddpm_fast.presets import PRESETS
from ddpm_fast.runs import checkpoint, diffusers_folder
from ddpm_fast.runs.directory import find_start
from ddpm_fast.runs.initial import initial_weights
from ddpm_fast.runs.run import Run
from tests.runs.diffusers_models import perturbed

SOURCE = Config(
    unet=UNetConfig(1, 8, 8, 8, (1,), 1, (), groups=4, details="diffusers"),
    diffusion=DiffusionConfig(timesteps=20, beta_end=0.5, prediction="v"),
    sampling=SamplerConfig("dpm++", 5),
)
TRAINING = TrainingConfig(steps=2, batch_size=4, warmup_steps=2, save_every=1, sample_every=0, device="cpu")


@pytest.fixture(scope="module", params=["run", "folder"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose averaged weights differ from its raw ones, or a folder of diffusers'."""
    directory = tmp_path_factory.mktemp("source")
    weights = perturbed(UNet(SOURCE.unet)).state_dict()
    raw = {name: tensor + 1 for name, tensor in weights.items()}
    path = checkpoint.save(directory / "run", 9, SOURCE, "f" * 40, {"model": raw, "ema": weights})
    found = checkpoint.read(path, ("ema",))
    diffusers_folder.write(directory / "folder", found, weights, {})
    return directory / request.param


def config_of(source: Path, **flags: object) -> Config:
    training = replace(TRAINING, init=str(source))
    return replace(SOURCE, data=DataConfig("digits"), training=training, **flags)  # pyright: ignore[reportArgumentType]


def test_the_network_and_the_process_are_the_sources(source):
    config = starting_config("mnist", StartOptions(), init=str(source))
    assert (config.unet, config.diffusion, config.sampling) == (SOURCE.unet, SOURCE.diffusion, SOURCE.sampling)
    assert config.data == PRESETS["mnist"].data
    assert config.training == replace(PRESETS["mnist"].training, init=str(source))


def test_step_0_is_the_sources_average_and_is_all_that_a_resumed_run_needs(source, tmp_path):
    config, dataset = config_of(source), open_dataset(DataConfig("digits"), SOURCE.unet)
    expected = diffusers_folder.resolve(source, ("ema",)).tensors("ema")

    def run(directory: Path, resume: bool) -> Run:
        found = find_start(directory, config, dataset.fingerprint, resume)
        return Run(directory, config, dataset, found, progress=False)

    first = run(tmp_path / "first", resume=False)
    first.start_from(initial_weights(config))
    begun = checkpoint.read(checkpoint.path_of(tmp_path / "first", 0))
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in begun.tensors(part).items())
    assert all(not tensor.any() for name, tensor in begun.tensors("optimizer").items() if "exp_avg" in name)
    shutil.copytree(tmp_path / "first", tmp_path / "again")
    first.train()
    run(tmp_path / "again", resume=True).train()
    paths = [checkpoint.path_of(tmp_path / name, 2) for name in ("first", "again")]
    for part in ("model", "ema"):
        one, other = (checkpoint.read(path).tensors(part) for path in paths)
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        assert not torch.equal(one["conv_in.weight"], expected["conv_in.weight"])


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("unet", "channels", 16),
        ("unet", "details", "paper"),
        ("diffusion", "prediction", "eps"),
        ("diffusion", "schedule", "cosine"),
    ],
)
def test_what_the_weights_mean_cannot_be_changed(part, field, value, source):
    config = config_of(source, **{part: replace(getattr(SOURCE, part), **{field: value})})
    named = f"--{field} is {value}: the weights of --init {source} are of --{field}"
    with pytest.raises(InputError, match=named):
        initial_weights(config)


def test_what_the_weights_do_not_depend_on_may_be_changed(source):
    diffusion = replace(SOURCE.diffusion, variance="small", clip=False)
    weights = initial_weights(config_of(source, unet=replace(SOURCE.unet, dropout=0.1), diffusion=diffusion))
    assert len(weights) == len(UNet(SOURCE.unet).state_dict())


def test_a_source_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        api.train(init=tmp_path / "none", progress=False)
    with pytest.raises(InputError, match="does not exist"):
        starting_config(None, StartOptions(), init=str(tmp_path / "none"))


def test_the_command_line_takes_the_sources_network(source):
    pytest.importorskip("tyro")
    from ddpm_fast.cli.main import parse_train

    parsed = parse_train(["--init", str(source), "--steps", "3"])
    assert parsed.config.unet == SOURCE.unet
    assert (parsed.config.training.init, parsed.config.training.steps) == (str(source), 3)
    assert parse_train(["--init", str(source), "--channels", "16"]).config.unet.channels == 16  # refused when it starts
