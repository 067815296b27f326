"""Folders in diffusers' format: read as a checkpoint, and written from one. diffusers itself is not needed.

    model_index.json   unet/config.json   unet/diffusion_pytorch_model.safetensors   scheduler/scheduler_config.json
    ddpm-fast.json     what we know beyond that: the step, the data's fingerprint and our configuration

A UNet2DModel's folder alone is read, too, and older pipelines, which keep all in one folder. Where diffusers' files say
what ours would, our configuration is taken from ddpm-fast.json, which says more; where they were edited, they hold.

A network that is told labels has num_class_embeds. The last of them is "no label" where ddpm-fast.json says so. Where
nothing does, all are classes: it counts as trained with --label-dropout 0, hence neither label -1 nor guidance by its
own prediction without label is to be had, until it is trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ddpm_fast.config import Config, with_training
from ddpm_fast.diffusion.convert import process_and_sampler, scheduler_fields
from ddpm_fast.errors import InputError, require
from ddpm_fast.files import parse_json, whole, write_synced
from ddpm_fast.flags import from_dict, to_dict
from ddpm_fast.model.convert import new_names, unet_config, unet_fields, with_no_label
from ddpm_fast.runs import checkpoint

HUB = "hf:"
"""What a model's name on the Hugging Face hub begins with."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
OURS = "ddpm-fast.json"
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
READ = ["*.json", "**/*.json", f"**/{WEIGHTS}", WEIGHTS]
"""What is downloaded of a model: nothing else is read."""


@dataclass(frozen=True, kw_only=True)
class DiffusersFolder(checkpoint.Checkpoint):
    """A folder of diffusers', as a checkpoint: its weights are what averaged ones are to ours."""

    weights: Path
    all_classes: bool
    """Whether every row of the file's class embedding is a class, none "no label"."""

    def files(self, part: str) -> list[Path]:
        """Return the files that decide what the weights make."""
        return [self.weights, *sorted(self.path.rglob("*config.json")), *self.path.glob(OURS)]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Read the weights, by their names of today, in float32; a class embedding's last row is "no label".

        Raises:
            InputError: others than "ema" are asked for; or the file is missing, a pickle or damaged.
        """
        require(part == "ema", f"{self.path} holds one set of weights: leave --weights raw out")
        try:
            tensors = new_names(safetensors.torch.load_file(self.weights))
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(_unreadable(self.weights, error)) from None
        return with_no_label(tensors) if self.all_classes else tensors


def _unreadable(file: Path, error: Exception) -> str:
    pickled = file.with_suffix(".bin")
    if file.exists():
        return f"{file} is truncated or no safetensors file ({str(error).splitlines()[0]})"
    if pickled.exists():
        return f"{pickled} is a pickle, which could run any code: save the model again as safetensors"
    return f"{file} is missing: weights are read from one safetensors file, never from a .bin, which is a pickle"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = parse_json(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({str(error).splitlines()[0]})") from None
    require(isinstance(values, dict), f"{file} is no object")
    return values


def is_one(path: Path) -> bool:
    """Return whether a directory is in diffusers' format, whatever it holds."""
    if (path / "model_index.json").exists():
        return True
    try:
        return "_class_name" in _read_json(path / "config.json")  # a run's config.json says nothing of the kind
    except InputError:
        return False


def read(path: Path) -> DiffusersFolder:
    """Open a pipeline's folder, or a UNet2DModel's; tensors are read when asked for.

    Raises:
        InputError: it is another pipeline or network, or a field cannot be honoured.
    """
    index = path / "model_index.json"
    if index.exists():
        kind = _read_json(index).get("_class_name")
        require(kind in PIPELINES, f"{index}: {kind} is none of {', '.join(PIPELINES)}")
    unet = path / "unet" if (path / "unet").is_dir() else path
    fields = _read_json(unet / "config.json")
    kind = fields.get("_class_name", "UNet2DModel")
    require(kind == "UNet2DModel", f"{unet / 'config.json'}: {kind} is no UNet2DModel")
    scheduler, told = _scheduler_of(path, index.exists())
    diffusion, sampling = process_and_sampler(told, str(scheduler))
    config = Config("none", unet_config(fields, str(unet / "config.json")), diffusion, sampling=sampling)
    rows = config.unet.classes
    step, fingerprint, config = _with_ours(path, config, told)
    all_classes = config.unet.classes == rows > 0
    config = with_training(config, label_dropout=0.0) if all_classes else config
    return DiffusersFolder(path, step, config, fingerprint, {}, weights=unet / WEIGHTS, all_classes=all_classes)


def _scheduler_of(path: Path, is_pipeline: bool) -> tuple[Path, dict[str, Any]]:
    """Return a scheduler's file and fields; DDPMScheduler's defaults, none, where a U-Net comes alone."""
    name = "scheduler_config.json"
    file = path / "scheduler" / name if (path / "scheduler").is_dir() else path / name
    return file, _read_json(file) if is_pipeline or file.exists() else {}


def _with_ours(path: Path, config: Config, told: Mapping[str, Any]) -> tuple[int, str, Config]:
    """Return the step, fingerprint and configuration with what ddpm-fast.json adds to diffusers' files."""
    file = path / OURS
    if not file.exists():
        return 0, "", config
    values = _read_json(file)
    try:
        own, step, fingerprint = from_dict(values["config"]), int(values["step"]), str(values["fingerprint"])
        has_no_label = config.unet.classes == own.unet.classes + 1 > 1
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file} lacks a step, a fingerprint or a configuration: remove it") from None
    if has_no_label:
        config = replace(config, unet=replace(config.unet, num_classes=own.unet.classes))
    if unet_fields(own.unet) == unet_fields(config.unet):
        config = replace(config, unet=own.unet)
    fields = scheduler_fields(own.diffusion, own.sampling)
    if {name: told.get(name) for name in fields} == fields:
        config = replace(config, diffusion=own.diffusion, sampling=own.sampling)
    return step, fingerprint, replace(own, unet=config.unet, diffusion=config.diffusion, sampling=config.sampling)


def resolve(source: Path, parts: tuple[str, ...]) -> checkpoint.Checkpoint:
    """Find the checkpoint that RUN, CHECKPOINT, FOLDER or hf:NAME means, of which only some parts are needed.

    Raises:
        InputError: there is none, it is damaged, or cannot be honoured.
    """
    name = str(source)
    if name.startswith(HUB):
        source = download(name.removeprefix(HUB))
        require(is_one(source), f"{name} is no diffusers model: it has neither model_index.json nor a U-Net's config")
    return read(source) if is_one(source) else checkpoint.resolve(source, parts)


def home_of(source: Path, found: checkpoint.Checkpoint) -> Path:
    """Return where what is made of a model is kept: its run, or a directory of its name for one of the hub."""
    name = str(source)
    return Path(name.removeprefix(HUB).replace("/", "-")) if name.startswith(HUB) else checkpoint.run_of(found.path)


def download(name: str) -> Path:
    """Fetch a model from the Hugging Face hub, or find it in the hub's own cache; returns its folder.

    No token is sent at first: only where that is refused, and the user has logged in, is the model asked for by name.

    Raises:
        InputError: it is not there, or cannot be reached.
    """
    try:
        from huggingface_hub import errors, get_token, snapshot_download
    except ImportError:
        raise InputError(f"{HUB}{name} needs huggingface_hub: pip install 'ddpm-fast[hub]'") from None
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library, whichever it is
    try:
        try:
            return Path(snapshot_download(name, allow_patterns=READ, token=False))
        except errors.RepositoryNotFoundError:  # nor is one that is private or gated shown to strangers
            if not get_token():
                raise
            return Path(snapshot_download(name, allow_patterns=READ))
    except errors.RepositoryNotFoundError:
        raise InputError(f"{HUB}{name} does not exist on the hub, or is private: hf auth login") from None
    except (http_error, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{HUB}{name} cannot be fetched: {reason}") from None


def write(path: Path, found: checkpoint.Checkpoint, weights: Mapping[str, Tensor], extra: Mapping[str, bytes]) -> None:
    """Write a folder that DDPMPipeline.from_pretrained loads, whole or not at all.

    Args:
        path: where, which must not exist.
        found: whose configuration, step and fingerprint.
        weights: the U-Net's parameters.
        extra: further files at its top, by name.

    Raises:
        InputError: it cannot be written, or a scheduler has no equal of the run's sampler.
    """
    config = found.config
    unet, scheduler = unet_fields(config.unet), scheduler_fields(config.diffusion, config.sampling)
    index = {
        "_class_name": "DDIMPipeline" if config.sampling.sampler == "ddim" else "DDPMPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    ours = {"step": found.step, "fingerprint": found.fingerprint, "config": to_dict(config)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    files = {
        "model_index.json": checkpoint.to_json(index),
        "unet/config.json": checkpoint.to_json(unet),
        f"unet/{WEIGHTS}": safetensors.torch.save(tensors, {"format": "pt"}),
        "scheduler/scheduler_config.json": checkpoint.to_json(scheduler),
        OURS: checkpoint.to_json(ours),
        **extra,
    }
    with whole(path, remedy="choose another DEST") as temporary:
        for name, data in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(temporary / name, data)
