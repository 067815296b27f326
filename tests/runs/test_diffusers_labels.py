"""Models that are told labels, to diffusers and back: what each row of the embedding is, held to diffusers' network."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from ddpm_fast import api
from ddpm_fast.config import Config, DiffusionConfig, SamplerConfig, UNetConfig, with_training
from ddpm_fast.diffusion.noise import NoiseAddress, Stream, key_from_seed, normal
from ddpm_fast.errors import InputError
from ddpm_fast.model.unet import UNet
from ddpm_fast.options import StartOptions
from ddpm_fast.planning.start import starting_config
from ddpm_fast.runs import checkpoint, diffusers_folder
from ddpm_fast.runs.asked import require_fitting
from ddpm_fast.runs.initial import initial_weights
from ddpm_fast.runs.model_card import model_card
from ddpm_fast.runs.trained_model import unet_of
from tests.runs.diffusers_models import SMALL, perturbed

CONFIG = Config(
    unet=UNetConfig(1, 8, 8, 8, (1, 2), 1, (4,), groups=4, num_classes=3),
    diffusion=DiffusionConfig(schedule="sigmoid", prediction="x0", variance="small"),
    sampling=SamplerConfig("dpm++", 5),
)
X, T = torch.randn(4, 1, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0, 437, 999, 437])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint: random weights of a small network of three classes."""
    directory = tmp_path_factory.mktemp("run")
    return checkpoint.save(directory, 7, CONFIG, "f" * 40, {"ema": perturbed(UNet(CONFIG.unet)).state_dict()})


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    """What it is in diffusers' format."""
    found = checkpoint.read(run, ("ema",))
    card = model_card("NAME", found, "ema", "").encode()
    diffusers_folder.write(run.parent / "folder", found, found.tensors("ema"), {"README.md": card})
    return run.parent / "folder"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that diffusers made, of three rows."""
    directory = tmp_path_factory.mktemp("foreign")
    unet: Any = perturbed(UNet2DModel(**SMALL, num_class_embeds=3))
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(directory)  # pyright: ignore[reportArgumentType]
    return directory


def network(folder: Path) -> Any:
    return UNet2DModel.from_pretrained(folder, subfolder="unet")


def require_same(ours: UNet, theirs: Any, labels: list[int]) -> None:
    """Compare what both predict of images of these labels, which are not the same whatever the label."""
    told = torch.tensor(labels)
    with torch.no_grad():
        predictions = theirs(X, T, class_labels=told).sample
        torch.testing.assert_close(ours(X, T, labels=told), predictions, rtol=1e-4, atol=1e-5)
        assert float((theirs(X, T, class_labels=told.roll(1)).sample - predictions).abs().max()) > 0.01


def test_a_conditional_run_goes_to_diffusers_and_comes_back_bit_for_bit(run, folder, tmp_path):
    require_same(unet_of(checkpoint.read(run, ("ema",)), "ema"), network(folder), [0, 1, 2, 3])  # 3 is "no label"
    back = diffusers_folder.read(folder)
    assert (back.config, back.step, back.fingerprint) == (CONFIG, 7, "f" * 40)
    again = checkpoint.save(tmp_path / "back", back.step, back.config, back.fingerprint, {"ema": back.tensors("ema")})
    for file in ("ema.safetensors", "state.json"):
        assert (again / file).read_bytes() == (run / file).read_bytes()


def test_the_cards_python_makes_the_images_of_a_label(run, folder, monkeypatch):
    card = (folder / "README.md").read_text()
    assert '0 to 2 are the classes, and the last, 3, is\n"no label".' in card
    assert "unconditional" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    noise = normal(NoiseAddress(key_from_seed(0), torch.arange(4)), 0, Stream.SAMPLING, (1, 8, 8))
    monkeypatch.setattr(torch, "randn", lambda *_: noise.clone())
    made: dict[str, Any] = {}
    exec(code.replace("NAME", str(folder)).replace("[0, 0, 0, 0]", "[2, 2, 0, 2]"), made)
    monkeypatch.undo()
    ours = api.load(run).sample(4, return_tensor=True, progress=False, label=[2, 2, 0, 2])
    assert float((ours - made["x"]).abs().max()) < 1 / 255
    assert float((ours.abs() < 1).float().mean()) > 0.3  # there is something to compare
    with pytest.raises(ValueError, match="class_labels should be provided"):  # as the card says
        made["pipeline"](num_inference_steps=2)


def test_no_label_stays_so_where_another_field_was_edited(folder):
    file = folder / "unet" / "config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | {"dropout": 0.25}))
        found = diffusers_folder.read(folder)
    finally:
        file.write_text(before)
    assert found.config.unet == replace(CONFIG.unet, dropout=0.25)
    assert len(found.tensors("ema")["class_embedding.weight"]) == 4
    assert found.config.training == CONFIG.training


def test_every_row_of_others_is_a_class(foreign):
    found = diffusers_folder.read(foreign)
    assert found.config.unet.classes == 3
    theirs, ours = network(foreign), unet_of(found, "ema")
    require_same(ours, theirs, [2, 0, 1, 0])
    with torch.no_grad():  # and without a label, the time's embedding is left alone
        theirs.class_embedding.weight.zero_()
        expected = theirs(X, T, class_labels=torch.zeros(4, dtype=torch.int64)).sample
        torch.testing.assert_close(ours(X, T), expected, rtol=1e-4, atol=1e-5)
    model = api.load(foreign)
    assert len(model.sample(1, progress=False, steps=2, label=2)) == 1
    with pytest.raises(InputError, match="is not known to have seen images without"):
        model.sample(1, progress=False, steps=2, label=-1)
    with pytest.raises(InputError, match="cannot guide it"):
        model.sample(1, progress=False, steps=2, guidance=2.0)
    unconditional = replace(found.config, unet=replace(found.config.unet, num_classes=0))
    with pytest.raises(InputError, match="--guide theirs is not known to have seen images without"):
        require_fitting(found.config, unconditional, "theirs")
    require_fitting(found.config, found.config, "theirs")  # where labels are told, none is missing


def test_without_what_ours_adds_no_row_is_no_label(folder):
    file = folder / diffusers_folder.OURS
    file.rename(folder / "aside")
    try:
        config = diffusers_folder.read(folder).config
    finally:
        (folder / "aside").rename(file)
    assert (config.unet.classes, config.training.label_dropout) == (4, 0)


@pytest.mark.parametrize("source", ["folder", "foreign"])
def test_a_start_from_a_conditional_model_keeps_its_classes(source, request):
    path = request.getfixturevalue(source)
    config = starting_config("digits", StartOptions(), init=str(path))
    rows = initial_weights(config)["class_embedding.weight"]
    assert (config.unet.num_classes, config.training.label_dropout, len(rows)) == (3, 0.1, 4)
    given = network(path).class_embedding.weight
    assert torch.equal(rows[: len(given)], given)
    assert source == "folder" or not rows[3].any()


def test_a_pipeline_that_passes_no_labels_is_not_accelerated(foreign):
    with pytest.raises(InputError, match="num_class_embeds is 3, but a pipeline passes its U-Net no labels"):
        api.accelerate(DDPMPipeline.from_pretrained(foreign))


def test_a_card_says_where_no_label_was_never_trained(run):
    found = checkpoint.read(run, ("ema",))
    card = model_card("NAME", replace(found, config=with_training(found.config, label_dropout=0.0)), "ema", "")
    assert "never trained by that (label dropout 0)" in card
