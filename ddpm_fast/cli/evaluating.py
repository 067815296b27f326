"""What `ddpm-fast evaluate` does once its flags are known: samples, their scores as a table, and a file of both."""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from ddpm_fast.cli.arguments import EvaluateArguments
from ddpm_fast.cli.listing import run_meant
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.engine.threads import choose_threads
from ddpm_fast.errors import InputError
from ddpm_fast.files import replace_file, require_writable
from ddpm_fast.quality.evaluator import LEAST_BY_CLASS, table
from ddpm_fast.runs import checkpoint
from ddpm_fast.runs.directory import where_data_is
from ddpm_fast.runs.grids import to_uint8
from ddpm_fast.runs.samples import how
from ddpm_fast.runs.scores import asked_of, evaluator_of, labels_to_ask
from ddpm_fast.runs.trained_model import Model


def evaluate(arguments: EvaluateArguments) -> int:
    """Measure the quality of a checkpoint's samples; returns the exit status."""
    progress = sys.stderr.isatty()
    arguments = dataclasses.replace(arguments, run=str(run_meant(arguments.run)))
    model = Model(Path(arguments.run), arguments)
    if model.device.type == "cpu":
        choose_threads()
    sampler = arguments.sampler_for(model.config)
    labels = model.labels_for(arguments)
    which = f"seed{arguments.seed}{arguments.asked}" + (
        f"-from{arguments.first_index}" if arguments.first_index else ""
    )
    name = f"step-{model.step:07d}-{how(model, sampler)}-{which}-{arguments.count}-images.json"
    file = model.home / "quality" / name
    require_writable(file.parent)
    dataset = _real_images(arguments, model, progress)
    evaluator = evaluator_of(model.config, dataset, progress)
    wanted = arguments
    if labels and not arguments.label:  # as often as the real images have each
        labels = labels_to_ask(model.config, dataset)
        wanted = dataclasses.replace(arguments, label=labels)
    batches = [to_uint8(x) for _, x in model.batches(wanted, progress)]  # a quarter of the floats' memory
    numbers = range(arguments.first_index, arguments.first_index + arguments.count)
    scores = evaluator.score(np.concatenate(batches), asked_of(labels, numbers))
    print("\n".join(table(scores, arguments.count)))
    if evaluator.missing:
        print(evaluator.missing)
    elif labels and f"frechet_by_class_{arguments.count}" not in scores:
        print(f"no distance by class: that takes more than {LEAST_BY_CLASS} samples and real images of each")
    asked = {name: value for name, value in dataclasses.asdict(arguments).items() if name not in ("run", "data")}
    facts = {
        "checkpoint": str(model.path),
        "step": model.step,
        **asked,
        **dataclasses.asdict(sampler),
        "scores": scores,
    }
    replace_file(file, checkpoint.to_json(facts))
    print(f"kept in {file}")
    return 0


def _real_images(arguments: EvaluateArguments, model: Model, progress: bool) -> Dataset:
    """Open the images that a model was trained on.

    Raises:
        InputError: they are not there, or others are.
    """
    config = where_data_is(checkpoint.run_of(model.path), model.config)
    data = config.data
    if arguments.data and arguments.data != data.data:
        data = dataclasses.replace(data, data=arguments.data, revision="")  # the commit was of the other's
    try:
        dataset = open_dataset(data, config.unet, progress)
    except InputError as error:
        moved = "" if arguments.data else f"; {arguments.run} was trained on it: where it was moved, name it by --data"
        raise InputError(f"{error}{moved}") from None
    if dataset.fingerprint != model.fingerprint:
        raise InputError(
            f"--data {data.data} holds other images now than {arguments.run} was trained on: name those by --data"
        )
    return dataset
