"""What `ddpm-fast convert` does once its flags are known."""

import io
import sys
from dataclasses import replace
from pathlib import Path

from ddpm_fast.cli.arguments import ConvertArguments
from ddpm_fast.errors import require
from ddpm_fast.files import require_writable, whole
from ddpm_fast.options import LoadOptions, SamplingOptions
from ddpm_fast.runs import checkpoint, diffusers_folder
from ddpm_fast.runs.grids import grid, to_uint8
from ddpm_fast.runs.model_card import model_card
from ddpm_fast.runs.trained_model import Model, unet_of

CARD = SamplingOptions("dpm++", 20)
"""What draws the card's images: few steps."""
EXPORTS = (".onnx", ".pt2")


def convert(arguments: ConvertArguments) -> int:
    """Convert a model; returns the exit status."""
    source, dest = Path(arguments.source), Path(arguments.dest)
    require(not dest.exists() and not dest.is_symlink(), f"{dest} exists: name another DEST, or remove it")
    require_writable(dest.parent)
    part = "ema" if arguments.weights == "ema" else "model"
    found = diffusers_folder.resolve(source, (part,))
    if dest.suffix in EXPORTS:
        from ddpm_fast.runs.exports import export

        difference, classes = export(unet_of(found, part), dest), found.config.unet.classes
        inputs = f"x_t, t and labels ({classes} is none)" if classes else "x_t and t"
        print(f"{dest}: the U-Net of step {found.step:,}, from {inputs} to its prediction; {difference:.0e} off")
    elif isinstance(found, diffusers_folder.DiffusersFolder):
        _to_ours(found, dest)
    else:
        _to_diffusers(found, dest, part, arguments)
    return 0


def _to_ours(found: diffusers_folder.DiffusersFolder, dest: Path) -> None:
    unet = unet_of(found, "ema")  # which sees that all fits
    with whole(dest, remedy="choose another DEST") as temporary:
        checkpoint.save(temporary, found.step, found.config, found.fingerprint, {"ema": unet.state_dict()})
    print(f"{dest}: make images by ddpm-fast sample {dest}, train on by ddpm-fast train --init {dest}")
    if found.all_classes:
        print(f"its {found.config.unet.classes} labels all count as classes, none as no label: it cannot guide itself")


def _to_diffusers(found: checkpoint.Checkpoint, dest: Path, part: str, arguments: ConvertArguments) -> None:
    weights = unet_of(found, part).state_dict()
    files, caption = dict[str, bytes](), ""
    if arguments.images:
        steps = min(CARD.steps, found.config.diffusion.timesteps)
        model = Model(found.path, LoadOptions(weights=arguments.weights))
        samples = model.draw(replace(CARD, steps=steps, count=arguments.images), sys.stderr.isatty() or None)
        png = io.BytesIO()
        grid(to_uint8(samples)).save(png, "png")
        files["samples.png"] = png.getvalue()
        of = "of labels 0, 1, ... in turn, " if found.config.unet.classes else ""
        caption = f"Images 0 to {arguments.images - 1} of seed 0, {of}{CARD.sampler} in {steps} steps, not selected."
    files["README.md"] = model_card(dest.name, found, arguments.weights, caption).encode()
    diffusers_folder.write(dest, found, weights, files)
    print(f"{dest}: load it by diffusers' DiffusionPipeline.from_pretrained; README.md is its model card")
