"""What may be asked of a trained model beside which images: their labels, and what guides it."""

from dataclasses import replace
from pathlib import Path

from ddpm_fast.config import Config, DiffusionConfig
from ddpm_fast.errors import flag, require
from ddpm_fast.options import SamplingOptions

NONE = -1
"""Asks for an image without a label."""
UNKNOWING = "is not known to have seen images without their label (--label-dropout 0)"
"""So a run was asked to train; and so counts another's model, in whose files nothing says that a label means none."""


def labels_asked(wanted: SamplingOptions, config: Config, path: Path) -> tuple[int, ...]:
    """Return the labels of images 0, 1, ..., over and over, as the U-Net is told them; none of an unconditional one.

    Args:
        wanted: what is asked for.
        config: of the model.
        path: of its checkpoint, for messages.

    Raises:
        InputError: the model knows no such label, or none at all; or nothing guides it.
    """
    classes, withheld = config.unet.classes, config.training.label_dropout > 0
    asked = f"--label {wanted.label[0]}" if len(wanted.label) == 1 else f"--label {wanted.label}"
    require(classes > 0 or not wanted.label, f"{asked}: {path} was trained without labels: leave it out")
    for label in wanted.label:
        known = f"it knows 0 to {classes - 1}, and {NONE} for none"
        require(NONE <= label < classes, f"{asked}: {path} knows no label {label}: {known}")
        require(withheld or label != NONE, f"{asked}: {path} {UNKNOWING}")
    if wanted.guidance != 1 and not wanted.guide:
        guides = f"--guidance {wanted.guidance:g}: {path}"
        remedy = "its own prediction without label cannot guide it: name another run by --guide"
        require(classes > 0, f"{guides} was trained without labels: {remedy}")
        require(withheld, f"{guides} {UNKNOWING}: {remedy}")
    return tuple(classes if label == NONE else label for label in wanted.label or range(classes))


def require_fitting(guide: Config, config: Config, name: str) -> None:
    """Refuse a guide whose predictions are not of the same images, noise and labels.

    Raises:
        InputError: so it is; what differs is named.
    """
    shapes = [(unet.image_channels, unet.height, unet.width) for unet in (guide.unet, config.unet)]
    sizes = ["x".join(map(str, shape)) for shape in shapes]
    require(shapes[0] == shapes[1], f"--guide {name} makes images of {sizes[0]}, not {sizes[1]}: name one that fits")
    theirs, ours = (_process(each.diffusion) for each in (guide, config))
    for field in ("timesteps", "schedule", "prediction", "beta_start", "beta_end"):
        there, here = getattr(theirs, field), getattr(ours, field)
        require(there == here, f"--guide {name} has {flag(field)} {there}, not {here}: name one that fits")
    there, here = guide.unet.classes, config.unet.classes
    require(
        0 in (there, here) or there == here, f"--guide {name} knows {there} classes, not {here}: name one that fits"
    )
    withheld = guide.training.label_dropout > 0  # of it, an unconditional model asks predictions without a label
    require(here > 0 or there == 0 or withheld, f"--guide {name} {UNKNOWING}: name one that fits")


def _process(diffusion: DiffusionConfig) -> DiffusionConfig:
    """Return the configuration without betas that its schedule does not read."""
    default = DiffusionConfig()
    is_linear = diffusion.schedule == "linear"
    return diffusion if is_linear else replace(diffusion, beta_start=default.beta_start, beta_end=default.beta_end)
