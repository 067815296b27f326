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

from ddpm_fast.model.convert import unet_config


@pytest.fixture(scope="module")
def theirs() -> UNet2DModel:
    return perturbed(UNet2DModel(**SMALL))


@pytest.fixture(scope="module")
def unet(theirs: UNet2DModel) -> UNet:
    unet = UNet(unet_config(dict(theirs.config), "config.json"))
    unet.load_state_dict(theirs.state_dict())
    return unet


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
        (found,) = session.run(None, {"x_t": x.numpy(), "t": t.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, theirs(x, t).sample.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_pt2_file_predicts_as_diffusers_does_at_any_batch_size(unet, theirs, tmp_path):
    file = tmp_path / "unet.pt2"
    assert exports.export(unet, file) < 1e-5
    program = torch.export.load(file).module()  # our own file
    for images in (1, 5):
        x, t = torch.randn(images, 1, 8, 8, generator=torch.manual_seed(1)), torch.arange(images) * 200
        with torch.no_grad():
            torch.testing.assert_close(program(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-5)


def test_what_predicts_something_else_is_not_kept(tmp_path, monkeypatch):
    unet = UNet(UNetConfig(1, 4, 4, 4, (1,), 1, (), groups=2))
    monkeypatch.setattr(exports, "_write_pt2", lambda _, file: file.touch() or (lambda x, t: x * 0))
    with pytest.raises(MathematicsError, match="something else"):
        exports.export(unet, tmp_path / "unet.pt2")
    assert list(tmp_path.iterdir()) == []
