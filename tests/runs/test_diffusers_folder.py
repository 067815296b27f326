"""Models to diffusers and back, held to diffusers' own networks, schedulers and pipelines."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from ddpm_fast import api
from ddpm_fast.config import Config, DiffusionConfig, SamplerConfig, UNetConfig
from ddpm_fast.diffusion.noise import NoiseAddress, Stream, key_from_seed, normal
from ddpm_fast.diffusion.samplers import sampler_table
from ddpm_fast.errors import InputError
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import reference
from ddpm_fast.runs import checkpoint, diffusers_folder
from tests.runs.diffusers_models import PAPER, SMALL, perturbed, pipeline

SCHEDULERS: dict[str, Any] = {
    "ddpm": DDPMScheduler(),
    "ddpm-large-trailing": DDPMScheduler(variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing"),
    "ddpm-cosine-v": DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "ddpm-log": DDPMScheduler(500, beta_end=0.03, variance_type="fixed_small_log", timestep_spacing="linspace"),
    "ddpm-threshold": DDPMScheduler(thresholding=True, prediction_type="sample"),
    "ddim": DDIMScheduler(),
    "ddim-trailing-v": DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction", steps_offset=1),
    "ddim-x0": DDIMScheduler(prediction_type="sample", clip_sample=False, beta_start=1e-4, beta_end=0.02),
    "dpm++": DPMSolverMultistepScheduler(),
    "dpm++-leading": DPMSolverMultistepScheduler.from_config(DDPMScheduler().config),
    "dpm++-x0": DPMSolverMultistepScheduler(prediction_type="sample"),
    "dpm++-clipped": DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, timestep_spacing="trailing", lower_order_final=False
    ),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "papers": {**SMALL, **PAPER},
    "defaults": SMALL,
    "one head of few channels": {**SMALL, **PAPER, "attention_head_dim": 4},
    "not square": {**SMALL, "sample_size": (8, 12), "in_channels": 3, "out_channels": 3, "layers_per_block": 2},
    "attention at two": {
        **SMALL,
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "act_fn": "swish",
        "num_train_timesteps": 1000,
    },
}
STEPS = 20


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_diffusers_is_read_as_it_computes(name, tmp_path):
    theirs = perturbed(UNet2DModel(**NETWORKS[name]))
    theirs.save_pretrained(tmp_path)  # a U-Net alone
    found = diffusers_folder.resolve(tmp_path, ("ema",))
    ours = UNet(found.config.unet)
    ours.load_state_dict(found.tensors("ema"))
    shape = (3, found.config.unet.image_channels, found.config.unet.height, found.config.unet.width)
    x, t = torch.randn(shape, generator=torch.manual_seed(0)), torch.tensor([0, 437, 999])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-5)
    assert found.config.diffusion == DiffusionConfig(variance="small")


def test_attention_by_its_old_names_is_the_same(tmp_path):
    import safetensors.torch

    pipeline().save_pretrained(tmp_path)
    file, found = tmp_path / "unet" / diffusers_folder.WEIGHTS, diffusers_folder.read(tmp_path)
    old, now = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}, found.tensors("ema")
    renamed = dict(now)
    for name in [name for name in now if ".attentions." in name]:
        for new, before in old.items():
            if f".{new}." in name:
                renamed[name.replace(f".{new}.", f".{before}.")] = renamed.pop(name)
    assert sum("proj_attn" in name for name in renamed) == 2 * (3 + 1)  # weights and biases of 1 + 2 + 1 attentions
    safetensors.torch.save_file({name: tensor.half() for name, tensor in renamed.items()}, file)
    assert found.tensors("ema").keys() == now.keys()
    for name, tensor in found.tensors("ema").items():
        assert torch.equal(tensor, now[name].half().float()), name


def one_step(table_row: int, found: Config, steps: int, x: Tensor, prediction: Tensor, x0: Tensor, z: Tensor) -> Tensor:
    """Take one row of our table, in float32, with the given noise."""
    table = sampler_table(found.diffusion, dataclasses.replace(found.sampling, steps=steps))
    quiet, x = table.rows.clone(), x.clone()
    quiet[:, -1] = 0
    address = (key_from_seed(0), torch.arange(len(x)))
    reference.reverse_step(
        x, prediction, quiet.float(), torch.tensor([table_row]), *address, x0=x0, clip=table.clip, noisy=False
    )
    return x + table.rows[table_row, -1].float() * z


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_from_the_same_x_t_is_the_schedulers(name, tmp_path, monkeypatch):
    scheduler, steps = SCHEDULERS[name], STEPS
    pipeline(scheduler).save_pretrained(tmp_path)
    config = diffusers_folder.read(tmp_path).config
    scheduler.set_timesteps(steps)
    rows = sampler_table(config.diffusion, dataclasses.replace(config.sampling, steps=steps)).rows
    assert rows[:, 0].tolist() == scheduler.timesteps.tolist()
    x, x0 = torch.randn(2, 1, 4, 4, generator=torch.manual_seed(0)), torch.zeros(2, 1, 4, 4)
    for k, t in enumerate(scheduler.timesteps):
        prediction, z = torch.randn(2, *x.shape, generator=torch.manual_seed(k + 1)).unbind()
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z)
        ours = one_step(k, config, steps, x, prediction, x0, z)
        theirs = scheduler.step(prediction, t, x).prev_sample
        if k == steps - 1 and "large-trailing" in name:  # theirs adds noise to the image that it ends on, but at t = 0
            continue
        assert float((ours - theirs).abs().max()) < 1e-4 * max(1.0, float(theirs.abs().max())), f"step {k}"
        x = theirs


def hand_over_noise(monkeypatch: pytest.MonkeyPatch, images: int, seed: int = 0) -> None:
    """Have diffusers' pipelines and schedulers draw our noise of images 0 to images - 1, in their order."""
    address, drawn = NoiseAddress(key_from_seed(seed), torch.arange(images)), []

    def randn_tensor(shape: Any, *_: Any, **__: Any) -> Tensor:
        drawn.append(None)
        return normal(address, len(drawn) - 1, Stream.SAMPLING, tuple(shape)[1:])  # pyright: ignore[reportArgumentType]

    for module in ("pipelines.ddpm.pipeline_ddpm", "pipelines.ddim.pipeline_ddim", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", randn_tensor)


@pytest.mark.parametrize("name", ["ddpm", "ddpm-cosine-v", "ddim", "dpm++-x0"])
def test_images_of_the_same_noise_are_the_pipelines(name, tmp_path, monkeypatch):
    made = pipeline(SCHEDULERS[name])
    made.save_pretrained(tmp_path)
    model = api.load(tmp_path)
    ours = model.sample(3, return_tensor=True, progress=False, steps=50)
    hand_over_noise(monkeypatch, 3)
    theirs = made(batch_size=3, num_inference_steps=50, output_type="pt").images
    assert float(((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max()) < 1 / 255
    assert float(((theirs > 0) & (theirs < 1)).float().mean()) > 0.3  # there is something to compare


RUNS = {
    "ddpm": Config(diffusion=DiffusionConfig(40, beta_end=0.3), sampling=SamplerConfig("ddpm")),
    "ddim": Config(diffusion=DiffusionConfig(schedule="cosine", prediction="v"), sampling=SamplerConfig("ddim", 20)),
    "dpm++": Config(
        diffusion=DiffusionConfig(schedule="sigmoid", variance="small"), sampling=SamplerConfig("dpm++", 10)
    ),
}


def run_of(config: Config, directory: Path) -> Path:
    """Write a run's checkpoint: random weights of a small network."""
    unet = UNetConfig(1, 8, 8, 8, (1, 2), 1, (4,), groups=4)
    weights = perturbed(UNet(unet)).state_dict()
    return checkpoint.save(directory, 7, dataclasses.replace(config, unet=unet), "f" * 40, {"ema": weights})


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_to_diffusers_and_comes_back_bit_for_bit(name, tmp_path, monkeypatch):
    path = run_of(RUNS[name], tmp_path / "run")
    found = checkpoint.read(path, ("ema",))
    diffusers_folder.write(tmp_path / "theirs", found, found.tensors("ema"), {})
    back = diffusers_folder.read(tmp_path / "theirs")
    assert (back.config, back.step, back.fingerprint) == (found.config, 7, "f" * 40)
    again = checkpoint.save(tmp_path / "back", back.step, back.config, back.fingerprint, {"ema": back.tensors("ema")})
    for file in ("ema.safetensors", "state.json"):
        assert (again / file).read_bytes() == (path / file).read_bytes()
    ours = api.load(path).sample(2, return_tensor=True, progress=False)
    made: Any = DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    assert type(DDPMPipeline.from_pretrained(tmp_path / "theirs").scheduler) is type(made.scheduler)
    expected: Any = DDIMPipeline if name == "ddim" else DDPMPipeline
    assert made.__class__ is expected
    hand_over_noise(monkeypatch, 2)
    theirs = made(batch_size=2, num_inference_steps=found.config.sampling.steps or 40, output_type="pt").images
    assert float(((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max()) < 1 / 255


def test_what_was_edited_in_diffusers_files_holds(tmp_path):
    found = checkpoint.read(run_of(RUNS["ddpm"], tmp_path / "run"), ("ema",))
    diffusers_folder.write(tmp_path / "theirs", found, found.tensors("ema"), {})
    file = tmp_path / "theirs" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_sample": False}))
    back = diffusers_folder.read(tmp_path / "theirs").config
    assert not back.diffusion.clip
    assert back.sampling.steps == 0
    assert back.training == found.config.training


def test_an_old_pipeline_of_one_folder_is_read(tmp_path):
    pipeline().save_pretrained(tmp_path)
    for file in [*(tmp_path / "unet").iterdir(), *(tmp_path / "scheduler").iterdir()]:
        file.rename(tmp_path / file.name)
    for name in ("unet", "scheduler"):
        (tmp_path / name).rmdir()
    values = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "tensor_format": "pt"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(values))
    found = diffusers_folder.read(tmp_path)
    assert found.config.diffusion == DiffusionConfig()
    assert len(found.tensors("ema")) > 100


def test_raw_weights_of_one_set_are_refused(tmp_path):
    pipeline().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="one set of weights"):
        api.load(tmp_path, weights="raw")
