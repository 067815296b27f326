"""Are the weights that were trained those that are saved, loaded and sampled from: the average, or the raw ones?

Everything is written for real, into a directory that is removed afterwards.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.checks.draws import with_least_unet
from ddpm_fast.checks.loops import BATCH, images_of, relative, tolerance
from ddpm_fast.checks.pictures import bands_of
from ddpm_fast.checks.results import CheckResult, Stage, judged
from ddpm_fast.checks.stand_in import perturb
from ddpm_fast.config import Config, SamplerConfig, SamplerName, with_training
from ddpm_fast.data.batches import BatchSource
from ddpm_fast.data.conditions import class_labels
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.diffusion import samplers
from ddpm_fast.diffusion.noise import key_from_seed
from ddpm_fast.engine import sampling
from ddpm_fast.engine.execution import choose_dtype
from ddpm_fast.engine.networks import sampling_copy
from ddpm_fast.engine.trainer import Trainer
from ddpm_fast.model.unet import UNet
from ddpm_fast.ops import choose_ops
from ddpm_fast.options import LoadOptions, SamplingOptions
from ddpm_fast.runs import checkpoint, grids
from ddpm_fast.runs.run import Run
from ddpm_fast.runs.trained_model import Model

STEP = 3
SMALL: dict[str, Any] = {
    "height": 4,
    "width": 6,
    "channels": 4,
    "channel_multipliers": (1,),
    "res_blocks": 1,
    "attention_resolutions": (),
    "groups": 2,
    "head_channels": 0,
}
"""What replaces the fields of the run's U-Net."""
IMAGES = 64
"""Of the data set."""
CHECKPOINT, MODEL, RUN = "ddpm_fast/runs/checkpoint.py", "ddpm_fast/runs/trained_model.py", "ddpm_fast/runs/run.py"
STATE = "ddpm_fast/engine/flat_weights.py, ddpm_fast/engine/trainer.py"
TRAINER, PREVIEWS = "ddpm_fast/engine/trainer.py", "ddpm_fast/runs/previews.py"


def check_saved(config: Config, device: torch.device) -> Iterator[CheckResult]:
    """Check that what was trained is what is saved, loaded and sampled from: the average, or the raw weights.

    Args:
        config: the run's; its U-Net is a small one, since files know nothing of its structure.
        device: to run on.
    """
    config = replace(config, unet=replace(config.unet, **SMALL))
    config = with_training(config, device=device.type, compile=False, capture=False)
    config = replace(config, data=replace(config.data, holdout=0.5 if config.data.holdout else 0.0))
    with tempfile.TemporaryDirectory() as directory:
        yield from _check_saved(config, _numbered(config), Path(directory), device)
    yield _check_previews(config)


def _check_saved(config: Config, dataset: Dataset, directory: Path, device: torch.device) -> Iterator[CheckResult]:
    """Save a run into a directory, and look at what is there, what resumes from it, and what is sampled from it."""
    run = Run(directory, config, dataset, None, progress=False)
    trainer = run.trainer
    trainer.train_step_no_sync()
    trainer.step = STEP
    perturb(trainer.unet, seed=0)
    _set_average(trainer, seed=1)
    average, trained = _copies(trainer.ema), _copies(trainer.parameters)
    run.save()
    run.saver.wait()
    found = checkpoint.resolve(directory)
    parts: dict[str, Mapping[str, Tensor]] = {"model": trained, "ema": average}
    wrong = [part for part, weights in parts.items() if not _equal(found.tensors(part), weights)]
    name, expected = "a checkpoint holds the weights and their average", "both, bit for bit"
    text, file = f"other {' and '.join(wrong)} weights" if wrong else expected, f"{STATE}, {RUN} or {CHECKPOINT}"
    yield CheckResult("checkpoint", name, judged(not wrong), expected, text, file)
    resumed = Run(directory, config, dataset, found, progress=False).trainer
    yield _check_resuming(trainer, resumed)
    yield _check_order(config, dataset, resumed)
    images = {part: _images(config, found.tensors(part), device) for part in parts}
    yield from _check_models(config, directory, images)
    with trainer.ema_weights() as lent:
        right = _equal(dict(lent.named_parameters()), average)
    back = _equal(trainer.parameters, trained)
    name, expected = "the average is lent for previews", "the average inside, the trained weights afterwards"
    text = expected if right and back else "other weights " + ("afterwards" if right else "inside")
    yield CheckResult("ema", name, judged(right and back), expected, text, TRAINER)


def _numbered(config: Config) -> Dataset:
    """Return images that are each of one grey, another one for each."""
    shape = (IMAGES, config.unet.height, config.unet.width, config.unet.image_channels)
    images = np.broadcast_to(np.arange(IMAGES, dtype=np.uint8).reshape(-1, 1, 1, 1), shape).copy()
    return Dataset(images, "", "", labels=np.arange(IMAGES) % max(config.unet.classes, 1))


def _check_order(config: Config, dataset: Dataset, trainer: Trainer) -> CheckResult:
    """Check that a run trains on the examples whose order was checked (`examples`): all but those held out."""
    key = key_from_seed(config.training.seed)
    source = BatchSource(dataset, key, trainer.device, config.data.holdout, class_labels(config, dataset))
    pairs = zip(trainer.batch(STEP, 2 * IMAGES), source.batch(STEP, 2 * IMAGES), strict=True)
    right = all(torch.equal(found, expected) for found, expected in pairs)
    name, expected = "a run trains on its examples", "those of its seed and hold-out"
    return CheckResult("order", name, judged(right), expected, expected if right else "others", RUN)


def _check_resuming(trainer: Trainer, resumed: Trainer) -> CheckResult:
    """Check that a trainer that resumed from a checkpoint stands where the one that saved it stood."""
    unlike = [part for part, saved in trainer.state().items() if not _equal(resumed.state()[part], _copies(saved))]
    unlike += ["step"] if resumed.step != STEP else []
    name, expected = "a run resumes from what was saved", "weights, average, Adam's moments and step"
    text = f"another {unlike[0]}" if unlike else expected
    return CheckResult("checkpoint", name, judged(not unlike), expected, text, f"{STATE} or {RUN}")


@torch.no_grad()
def _set_average(trainer: Trainer, seed: int) -> None:
    """Make the average unlike the weights."""
    generator = torch.Generator().manual_seed(seed)
    for average in trainer.ema.values():
        average.copy_(0.3 * torch.randn(average.shape, generator=generator))


def _copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}


def _equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights have the same names and values."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].detach().cpu(), weight) for name, weight in expected.items()
    )


def _wanted(config: Config, sampler: SamplerName = "ddim") -> SamplingOptions:
    """Return a wish in which nothing has its default; DDIM alone has an eta."""
    steps, eta = min(2, config.diffusion.timesteps), 0.5 if sampler == "ddim" else 0.0
    where: dict[str, Any] = {"count": 3, "seed": 2**32 + 5, "first_index": 17, "batch_size": BATCH}
    if config.unet.classes:
        where |= {"label": (config.unet.classes - 1, 0), "guidance": 1.5 if config.training.label_dropout else 1.0}
    return SamplingOptions(sampler, steps, eta=eta, spacing="leading", **where)


def _unet_with(config: Config, weights: Mapping[str, Tensor], device: torch.device) -> UNet:
    """Return a U-Net that has these weights."""
    with torch.device("meta"):
        unet = UNet(config.unet).use(choose_ops(config.training.kernels, device))
    unet.load_state_dict(weights, assign=True)
    return unet.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _images(
    config: Config, weights: Mapping[str, Tensor], device: torch.device, sampler: SamplerName = "ddim"
) -> Tensor | None:
    """Make the images that a model with these weights should make."""
    unet, wanted = _unet_with(config, weights, device), _wanted(config, sampler)
    table = samplers.sampler_table(config.diffusion, SamplerConfig(sampler, wanted.steps, wanted.eta, wanted.spacing))
    guide = None if wanted.guidance == 1 else unet
    loop = sampling.SamplingLoop(unet, table, choose_dtype(config.training.precision, device), guide=guide)
    which = (wanted.seed, wanted.first_index, wanted.count)
    return images_of(loop, sampling.ImageRange(*which, labels=wanted.label, guidance=wanted.guidance))


def _check_models(config: Config, run: Path, images: Mapping[str, Tensor | None]) -> Iterator[CheckResult]:
    """Check a loaded model's configuration, and its images by either weights."""
    training = config.training
    choices: list[tuple[Literal["ema", "raw"], str, Stage]] = [("ema", "ema", "ema"), ("raw", "model", "checkpoint")]
    models = dict[str, Model]()
    for weights, part, stage in choices:
        options = LoadOptions(weights, training.device, training.precision, training.kernels, False, False)
        model = Model(run, options)
        name, expected = f"a loaded model is the run's (--weights {weights})", "the configuration that was saved"
        right = model.config == config and model.step == STEP
        unlike = [part for part in ("unet", "diffusion", "data", "training") if _differ(model.config, config, part)]
        text = expected if right else f"another {' and '.join(unlike) or 'step'}"
        yield CheckResult("checkpoint", name, judged(right), expected, text, CHECKPOINT)
        truths = {of: truth for of, truth in images.items() if truth is not None}
        if len(truths) < len(images):  # without clipping, weights that were never trained may lead anywhere
            continue
        found = model.draw(_wanted(config))
        off = {of: relative(found, truth) for of, truth in truths.items()}
        nearest = min(off, key=lambda of: off[of])
        name = f"--weights {weights} makes the images of {'the average' if weights == 'ema' else 'the raw weights'}"
        right = off[part] <= tolerance(choose_dtype(training.precision, model.device))
        other = f"{off[part]:.1e} off" + (f", those of the {nearest} weights" if off[nearest] < 1e-2 else "")
        yield CheckResult(stage, name, judged(right), "the same images", other, MODEL)
        models[weights] = model
    if models:
        yield _check_later_wishes(models["raw"], models["ema"].unet, images["ema"])


def _check_later_wishes(model: Model, other: UNet, images: Tensor | None) -> CheckResult:
    """Check that a model whose weights are exchanged, and that is asked for another sampler, does as it is told."""
    assert images is not None
    model.unet.load_state_dict(other.state_dict())
    wrong = list[str]()
    if not _alike(model.sample(progress=False, **vars(_wanted(model.config))), images):
        wrong.append("new weights")
    options = vars(_wanted(model.config, "ddpm"))
    truth = _images(model.config, other.state_dict(), model.device, "ddpm")
    if truth is not None and not _alike(model.sample(progress=False, **options), truth):
        wrong.append("another sampler")
    name, expected = "a model takes its weights and its wishes as they are now", "the pictures of these"
    text = f"other pictures after {wrong[0]}" if wrong else expected
    return CheckResult("checkpoint", name, judged(not wrong), expected, text, MODEL)


def _alike(pictures: grids.Images, images: Tensor) -> bool:
    """Whether pictures show images, but for rounding."""
    off = np.stack([bands_of(picture) for picture in pictures]).astype(int) - grids.to_uint8(images)
    return int(np.abs(off).max()) <= 1


def _differ(a: Config, b: Config, part: str) -> bool:
    return getattr(a, part) != getattr(b, part)


def _check_previews(config: Config) -> CheckResult:
    """Check that the grids drawn during training are drawn from the average, at first and later."""
    few = replace(config, diffusion=replace(config.diffusion, timesteps=min(2, config.diffusion.timesteps)))
    few = replace(few, data=replace(few.data, holdout=0.0))
    few = with_training(with_least_unet(few, (config.unet.image_channels, 4, 4)), batch_size=1, accumulate=1)
    blank, wrong = Dataset(np.zeros((1, 4, 4, config.unet.image_channels), np.uint8), "", ""), list[str]()
    with tempfile.TemporaryDirectory() as directory:
        previews = Run(Path(directory), few, blank, None, progress=False).previews
        for seed, time in enumerate(("first", "second"), start=1):
            _set_average(previews.trainer, seed)
            previews.draw(1)
            assert previews.loop is not None
            unet = _unet_with(few, previews.trainer.ema, previews.trainer.device)
            average = sampling_copy(unet, previews.loop.dtype)
            same = _equal(dict(previews.loop.unet.named_parameters()), _copies(dict(average.named_parameters())))
            wrong += [] if same else [time]
    name, expected = "previews are drawn from the average", "the average of that moment"
    text = f"other weights the {wrong[0]} time" if wrong else expected
    return CheckResult("ema", name, judged(not wrong), expected, text, f"{PREVIEWS} or {TRAINER}")
