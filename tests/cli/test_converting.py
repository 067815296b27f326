"""`ddpm-fast convert`: what it writes, and what it refuses, in one line and with nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("diffusers")
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from ddpm_fast import api
from ddpm_fast.cli import main as cli
from ddpm_fast.runs import diffusers_folder
from tests.runs.diffusers_models import pipeline

FOLDERS: dict[str, Any] = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}
ANY = {
    "beta_schedule": ("scaled_linear", "'linear' or 'squaredcos_cap_v2'"),
    "trained_betas": ([0.1] * 1000, "trained_betas"),
    "prediction_type": ("flow_prediction", "epsilon, sample, v_prediction"),
    "rescale_betas_zero_snr": (True, "False"),
    "thresholding": (True, "sample_max_value 2.0"),
    "num_train_timesteps": ("1000", "whole number"),
    "shift": (3.0, "not known"),
    "_class_name": ("PNDMScheduler", "DDPMScheduler"),
}
CLIPS = {"clip_sample_range": (0.5, "1.0"), "steps_offset": (1, "0"), "timestep_spacing": ("karras", "karras")}
SCHEDULERS = {
    "ddpm": {**ANY, **CLIPS, "variance_type": ("learned_range", "fixed_small"), "predict_epsilon": (False, "True")},
    "ddim": {**ANY, **CLIPS, "set_alpha_to_one": (False, "True"), "timestep_spacing": ("linspace", "trailing")},
    "dpm": {
        **ANY,
        "solver_order": (3, "2"),
        "algorithm_type": ("sde-dpmsolver++", "'dpmsolver++'"),
        "solver_type": ("heun", "midpoint"),
        "use_karras_sigmas": (True, "False"),
        "final_sigmas_type": ("sigma_min", "zero"),
        "lambda_min_clipped": (-5.1, "-inf"),
        "variance_type": ("learned", "None"),
    },
}
NETWORK = {
    "resnet_time_scale_shift": ("scale_shift", "default"),
    "down_block_types": (["DownBlock2D", "SkipDownBlock2D"], "AttnDownBlock2D"),
    "up_block_types": (["UpBlock2D", "AttnUpBlock2D"], "other levels"),
    "num_class_embeds": (0, "positive"),
    "class_embed_type": ("timestep", "None"),
    "out_channels": (2, "in_channels 1"),
    "downsample_padding": (0, "flip_sin_to_cos"),
    "block_out_channels": ([8, 12], "multiple of the first"),
    "time_embedding_dim": (16, "4 * 8"),
    "time_embedding_type": ("fourier", "positional"),
    "sample_size": (None, "pixels"),
    "attention_head_dim": (6, "heads of 6"),
    "layers_per_block": ([1, 1], "whole number"),
    "act_fn": ("gelu", "silu"),
    "norm_num_groups": (5, "groups"),
    "block_size": (3, "not known"),
    "_class_name": ("UNet2DConditionModel", "UNet2DModel"),
}
CASES = [("scheduler", kind, field) for kind, fields in SCHEDULERS.items() for field in fields]
CASES += [("unet", "ddpm", field) for field in NETWORK]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline of diffusers' by each kind of scheduler."""
    directory = tmp_path_factory.mktemp("theirs")
    for name, kind in FOLDERS.items():
        pipeline(kind()).save_pretrained(directory / name)
    return {name: directory / name for name in FOLDERS}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end in one line and status 2; return the line."""
    with pytest.raises(SystemExit, match="2"):
        cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ddpm-fast: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(("part", "kind", "field"), CASES)
def test_what_cannot_be_honoured_is_refused_by_name(part, kind, field, folders, tmp_path, capsys):
    name = "scheduler/scheduler_config.json" if part == "scheduler" else "unet/config.json"
    file = folders[kind] / name
    value, expected = (SCHEDULERS[kind] if part == "scheduler" else NETWORK)[field]
    before = file.read_text()
    try:
        more = {"sample_max_value": 2.0} if field == "thresholding" else {}
        file.write_text(json.dumps(json.loads(before) | {field: value} | more))
        line = refused(capsys, "convert", folders[kind], tmp_path / "dest")
    finally:
        file.write_text(before)
    assert str(file) in line
    assert expected in line
    assert field in line or field == "_class_name"
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_diffusers_becomes_one_of_ours(folders, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["convert", str(folders["ddim"]), str(tmp_path / "ours")])
    assert "ddpm-fast sample" in capsys.readouterr().out
    one, other = (
        api.load(path).sample(2, return_tensor=True, progress=False) for path in (folders["ddim"], tmp_path / "ours")
    )
    assert torch.equal(one, other)
    line = refused(capsys, "train", "--out", tmp_path / "ours", "--resume")
    assert f"--init {tmp_path / 'ours'}" in line


def test_a_run_becomes_a_folder_with_a_card(folders, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["convert", str(folders["dpm"]), str(tmp_path / "ours")])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--images", "2"])
    assert DDPMPipeline.from_pretrained(tmp_path / "theirs").unet.config.sample_size == 8
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "![samples](samples.png)" in card
    assert (tmp_path / "theirs" / "samples.png").exists()
    capsys.readouterr()
    assert "exists" in refused(capsys, "convert", tmp_path / "ours", tmp_path / "theirs")


def test_other_sources_are_refused(folders, tmp_path, capsys):
    empty, dest = tmp_path / "empty", tmp_path / "dest"
    empty.mkdir()
    assert "holds no checkpoint" in refused(capsys, "convert", empty, dest)
    assert "does not exist" in refused(capsys, "convert", tmp_path / "none", dest)
    assert "convert needs SOURCE and DEST" in refused(capsys, "convert", empty)
    (empty / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "StableDiffusionPipeline is none of DDPMPipeline" in refused(capsys, "convert", empty, dest)
    weights = folders["ddpm"] / "unet" / diffusers_folder.WEIGHTS
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-9])
        assert "truncated" in refused(capsys, "convert", folders["ddpm"], dest)
        weights.rename(weights.with_suffix(".bin"))
        assert "is a pickle" in refused(capsys, "convert", folders["ddpm"], dest)
    finally:
        weights.with_suffix(".bin").unlink()
        weights.write_bytes(before)
    assert not dest.exists()


def test_a_hub_model_is_fetched_only_by_its_name(folders, tmp_path, capsys, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or folders["ddpm"])
    assert api.load("hf:someone/ddpm-small").config == diffusers_folder.read(folders["ddpm"]).config
    assert asked == ["someone/ddpm-small"]

    def fail(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "hf:someone/else cannot be fetched: offline" in refused(capsys, "convert", "hf:someone/else", tmp_path / "d")
