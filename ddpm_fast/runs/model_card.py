"""A model card: what a model makes, how it was made and how good it is, as a README.md for the Hugging Face hub."""

import contextlib
import shlex
from pathlib import Path
from typing import Any

from ddpm_fast.config import Config
from ddpm_fast.files import parse_json
from ddpm_fast.runs import checkpoint, origin
from ddpm_fast.runs.directory import read_metrics

HEAD = """---
library_name: diffusers
{}tags:
- ddpm
- ddpm-fast
---
"""
"""What the hub reads of a card, which has no word for images of a class."""
UNCONDITIONAL = "pipeline_tag: unconditional-image-generation\n"


def model_card(name: str, found: checkpoint.Checkpoint, weights: str, samples: str) -> str:
    """Describe a checkpoint.

    Args:
        name: of the model.
        found: the checkpoint; the figures and the command are those of the run that it lies in, if it lies in one.
        weights: "ema" or "raw": which are described.
        samples: what samples.png shows; empty where there is none.
    """
    config, run = found.config, checkpoint.run_of(found.path)
    unet, steps = config.unet, config.sampling.steps or config.diffusion.timesteps
    picture = f"![samples](samples.png)\n\n{samples}\n\n" if samples else ""
    averaged = "averaged" if weights == "ema" else "last trained"
    text = f"""{HEAD.format("" if unet.classes else UNCONDITIONAL)}
# {name}

A denoising diffusion model (DDPM, Ho et al. 2020) of images of {unet.height}x{unet.width} pixels and
{unet.image_channels} channels: the {averaged} weights after {found.step:,} training steps.

{picture}{_labels(config)}```python
{_usage(name, config, steps)}
```

## How it was made
{_table(_facts(found))}
"""
    command = _command(run)
    text += f"```\n{command}\n```\n" if command else ""
    figures = _figures(run, found.step)
    return text + (f"\n## Figures\n{_table(figures)}" if figures else "")


def _usage(name: str, config: Config, steps: int) -> str:
    """Return the Python that makes four images: of one class in a loop, for a pipeline passes no labels."""
    unet = config.unet
    load = f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")
"""
    if not unet.classes:
        return f"{load}images = pipeline(batch_size=4, num_inference_steps={steps}).images"
    shape = f"4, {unet.image_channels}, {unet.height}, {unet.width}"
    return f"""import torch
{load}unet, scheduler = pipeline.unet.requires_grad_(False), pipeline.scheduler
scheduler.set_timesteps({steps})
x, labels = torch.randn({shape}), torch.tensor([0, 0, 0, 0])
for t in scheduler.timesteps:
    x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample  # at last, black to white: -1 to 1"""


def _labels(config: Config) -> str:
    """Return what a conditional U-Net's labels mean, and who passes them; empty for an unconditional one."""
    classes = config.unet.classes
    if not classes:
        return ""
    seen = "" if config.training.label_dropout else ", but it was never trained by that (label dropout 0)"
    return f"""The U-Net is told a label per image: 0 to {classes - 1} are the classes, and the last, {classes}, is
"no label"{seen}.
`DDPMPipeline` and `DDIMPipeline` pass no labels, without which this U-Net makes nothing: call it in a loop, or
use `ddpm-fast sample FOLDER --label 0`.

"""


def _facts(found: checkpoint.Checkpoint) -> dict[str, Any]:
    config = found.config
    unet, diffusion, training = config.unet, config.diffusion, config.training
    multipliers = ", ".join(map(str, unet.channel_multipliers))
    facts: dict[str, Any] = {
        "predicts": diffusion.prediction,
        "timesteps": f"{diffusion.timesteps}, {diffusion.schedule} schedule",
        "U-Net": f"{unet.channels} channels x {multipliers}; ResBlocks per level: {unet.res_blocks}",
    }
    if found.step:  # else somebody else trained it, who knows how
        facts |= {"batch size": training.batch_size, "learning rate": training.learning_rate}
        facts |= {"data": Path(config.data.data).name, "data's fingerprint": found.fingerprint[:12]}
    return facts


def _command(run: Path) -> str:
    """Return the command line that trained a run; empty where none is on record."""
    made_by = origin.read(run)
    command = made_by.facts.get("command") if made_by else None
    return shlex.join(["ddpm-fast", *map(str, command[1:])]) if isinstance(command, list) else ""


def _figures(run: Path, step: int) -> dict[str, Any]:
    """Return what was measured of a run up to a step: its loss, and the quality of its samples."""
    lines = [line for line in read_metrics(run) if line["step"] <= step]
    figures: dict[str, Any] = {}
    if lines and isinstance(lines[-1].get("loss"), int | float):
        figures["training loss"] = f"{lines[-1]['loss']:.4f} at step {lines[-1]['step']:,}"
    scores = [(line["step"], line["quality"]) for line in lines if line.get("quality")]
    for file in sorted((run / "quality").glob(f"step-{step:07d}-*.json")):
        with contextlib.suppress(ValueError, KeyError):  # a torn one
            values = parse_json(file.read_text())
            scores.append((values["step"], values["scores"]))
    for at, found in scores[-1:]:
        figures |= {name: f"{value:.4g} at step {at:,}" for name, value in found.items()}
    return figures


def _table(facts: dict[str, Any]) -> str:
    return "\n".join(["", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""])
