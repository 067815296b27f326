"""A pipeline on our loop makes the images that the pipeline makes of the same noise."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler

import ddpm_fast
from ddpm_fast.diffusion.noise import NoiseAddress, Stream, normal
from ddpm_fast.errors import InputError
from tests.runs.diffusers_models import pipeline

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler(), {"num_inference_steps": 25}),
    "ddim": (DDIMScheduler(), {"num_inference_steps": 25, "eta": 0.5}),
    "dpm": (DPMSolverMultistepScheduler(prediction_type="sample"), {"num_inference_steps": 8}),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def hand_over(monkeypatch: pytest.MonkeyPatch, address: NoiseAddress) -> None:
    drawn = []

    def randn_tensor(shape: Any, *_: Any, **__: Any) -> torch.Tensor:
        drawn.append(None)
        return normal(address, len(drawn) - 1, Stream.SAMPLING, tuple(shape)[1:])  # pyright: ignore[reportArgumentType]

    for module in ("pipelines.ddpm.pipeline_ddpm", "pipelines.ddim.pipeline_ddim"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", randn_tensor)
    for module in ("scheduling_ddpm", "scheduling_ddim"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", randn_tensor)


@pytest.mark.parametrize("name", CASES)
def test_images_of_the_same_noise_are_the_pipelines(name, monkeypatch):
    scheduler, keywords = CASES[name]
    theirs = pipeline(scheduler)
    ours = ddpm_fast.accelerate(theirs)
    assert inspect.signature(ours) == inspect.signature(theirs.__call__)
    found = {kind: ours(3, generator=generator(), output_type=kind, **keywords).images for kind in ("pt", "np", "pil")}
    key = torch.randint(2**32, (2,), generator=generator())
    hand_over(monkeypatch, NoiseAddress(key, torch.arange(3)))
    expected = theirs(3, output_type="np", **keywords).images
    assert np.abs(found["np"] - expected).max() < 1 / 255
    assert ((expected > 0) & (expected < 1)).mean() > 0.3  # there is something to compare
    assert torch.equal(found["pt"], torch.from_numpy(found["np"]).permute(0, 3, 1, 2))
    assert [image.mode for image in found["pil"]] == ["L"] * 3
    assert (
        np.abs(np.stack([np.asarray(image) for image in found["pil"]]) / 255 - found["np"][..., 0]).max() < 0.51 / 255
    )


def test_a_generator_per_image_decides_on_that_image_alone():
    ours = ddpm_fast.accelerate(pipeline(DDIMScheduler()))
    seeds = (7, 8, 9)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    (images,) = ours(3, generators, num_inference_steps=5, output_type="pt", return_dict=False)
    alone = ours(1, [torch.Generator().manual_seed(9)], num_inference_steps=5, output_type="pt").images
    torch.testing.assert_close(images[2:], alone, rtol=0, atol=1e-5)
    assert float((images[0] - images[1]).abs().max()) > 0.1
    assert len(ours(num_inference_steps=2)[0]) == 1  # a pipeline's defaults: one image, as Pillow's


def test_weights_are_those_of_then():
    made = pipeline(DDIMScheduler())
    ours = ddpm_fast.accelerate(made)
    before = ours(1, generator(), num_inference_steps=4, output_type="pt").images
    with torch.no_grad():
        for parameter in made.unet.parameters():
            parameter.zero_()
    ours(1, generator(), num_inference_steps=3)  # another loop, so that the next is made anew
    assert torch.equal(before, ours(1, generator(), num_inference_steps=4, output_type="pt").images)


def test_what_cannot_be_honoured_is_refused_by_name():
    with pytest.raises(InputError, match="PNDMScheduler is none of"):
        ddpm_fast.accelerate(pipeline(PNDMScheduler()))
    made = pipeline()
    made.unet.half()
    with pytest.raises(InputError, match="float16"):
        ddpm_fast.accelerate(made)
    ours = ddpm_fast.accelerate(pipeline(DDIMScheduler(timestep_spacing="trailing")))
    with pytest.raises(InputError, match="use_clipped_model_output is True"):
        ours(use_clipped_model_output=True, num_inference_steps=5)
    with pytest.raises(InputError, match="divides 1000"):
        ours(num_inference_steps=7)
    with pytest.raises(InputError, match="list of 1 for a batch_size of 2"):
        ours(2, [generator()], num_inference_steps=5)
    with pytest.raises(TypeError, match="guidance"):
        ours(guidance=2.0)
