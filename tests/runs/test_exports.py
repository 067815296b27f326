"""The exported U-Net, run by what reads such files, beside diffusers' own network."""

import numpy as np
import pytest
import torch

from ddpm_fast.config import UNetConfig
from ddpm_fast.errors import MathematicsError
from ddpm_fast.model.unet import UNet
from ddpm_fast.runs import exports
from tests.runs.diffusers_models import SMALL, perturbed

pytest.importorskip("diffusers")
from diffusers.models.unets.unet_2d import UNet2DModel

from ddpm_fast.model.convert import unet_config, with_no_label

ONE_LEVEL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
NETWORKS = {"unconditional": SMALL, "told labels": {**SMALL, **ONE_LEVEL, "num_class_embeds": 3}}


@pytest.fixture(scope="module", params=NETWORKS)
def theirs(request: pytest.FixtureRequest) -> UNet2DModel:
    return perturbed(UNet2DModel(**NETWORKS[request.param]))


@pytest.fixture(scope="module")
def unet(theirs: UNet2DModel) -> UNet:
    unet = UNet(unet_config(dict(theirs.config), "config.json"))
    tensors = theirs.state_dict()
    unet.load_state_dict(with_no_label(tensors) if unet.config.classes else tensors)
    return unet


def told(unet: UNet, images: int) -> dict[str, torch.Tensor]:
    return {"labels": torch.arange(images) % unet.config.classes} if unet.config.classes else {}


@pytest.mark.slow
def test_an_onnx_file_predicts_as_diffusers_does_at_any_batch_size(unet, theirs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "unet.onnx"
    assert exports.export(unet, file) < 1e-5
    assert [entry.name for entry in tmp_path.iterdir()] == ["unet.onnx"]
    session = onnxruntime.InferenceSession(file)
    for images in (1, 5):
        x, t = torch.randn(images, 1, 8, 8, generator=torch.manual_seed(1)), torch.arange(images) * 200
        labels = told(unet, images)
        inputs = {"x_t": x, "t": t, **labels}
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.no_grad():
            expected = theirs(x, t, class_labels=labels.get("labels")).sample.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_pt2_file_predicts_as_diffusers_does_at_any_batch_size(unet, theirs, tmp_path):
    file = tmp_path / "unet.pt2"
    assert exports.export(unet, file) < 1e-5
    program = torch.export.load(file).module()  # our own file
    for images in (1, 5):
        x, t = torch.randn(images, 1, 8, 8, generator=torch.manual_seed(1)), torch.arange(images) * 200
        labels = told(unet, images)
        with torch.no_grad():
            expected = theirs(x, t, class_labels=labels.get("labels")).sample
            torch.testing.assert_close(program(x, t, *labels.values()), expected, rtol=1e-4, atol=1e-5)


def test_what_predicts_something_else_is_not_kept(tmp_path, monkeypatch):
    unet = UNet(UNetConfig(1, 4, 4, 4, (1,), 1, (), groups=2))
    monkeypatch.setattr(exports, "_write_pt2", lambda _, file, __: file.touch() or (lambda x, t: x * 0))
    with pytest.raises(MathematicsError, match="something else"):
        exports.export(unet, tmp_path / "unet.pt2")
    assert list(tmp_path.iterdir()) == []
