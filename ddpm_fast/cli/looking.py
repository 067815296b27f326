"""What `ddpm-fast data` does: say what a data set is, and how it would be trained on, before any training."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from PIL import Image, PngImagePlugin

from ddpm_fast.cli.arguments import DataArguments
from ddpm_fast.config import Config, DataConfig
from ddpm_fast.data.dataset import Dataset, open_dataset, pictures_of
from ddpm_fast.data.duplicates import near_duplicates
from ddpm_fast.data.survey import Facts, survey
from ddpm_fast.engine.speed import this_machine
from ddpm_fast.errors import InputError, printable, require
from ddpm_fast.files import require_writable
from ddpm_fast.options import Wanted
from ddpm_fast.planning.auto import outlook
from ddpm_fast.planning.plan import plan, remarks
from ddpm_fast.runs.device import prepare_device
from ddpm_fast.runs.grids import save_picture
from ddpm_fast.runs.sheet import IMAGES, contact_sheet

NAMED = 5
"""How many files, pairs or classes are named one by one."""
OURS = "ddpm-fast data"
"""What a picture's file says of who wrote it: only such a one is replaced."""


def look(arguments: DataArguments) -> int:
    """Look at images, say what is found, and draw them; returns the exit status."""
    path = Path(arguments.out)
    require_ours(path)
    inside = Path(arguments.data).is_dir() and path.resolve().is_relative_to(Path(arguments.data).resolve())
    require(not inside, f"--out {path} lies in {arguments.data}, and would be one of its images: name another")
    require_writable(path.parent)
    progress = sys.stderr.isatty()
    columns = {name: getattr(arguments, name) for name in ("image_column", "label_column", "float_range")}
    data = DataConfig(arguments.data, skip_bad=True, **columns)
    facts = survey(data, all_sizes=True, progress=progress)
    shape = (arguments.image_channels or None, arguments.height or None, arguments.width or None)
    device = prepare_device(arguments.device, "auto")
    machine = this_machine(device, "auto")
    config = plan(facts, machine, data, Wanted(*shape, device=arguments.device), arguments.minutes)
    dataset = open_dataset(data, config.unet, progress)
    for name, value in (*_what_it_is(facts), *_what_is_in_it(data, dataset)):
        print(f"{name:<10}  {value}")
    print("\n".join(remarks(config, facts)))
    config = replace(config, data=replace(data, skip_bad=bool(dataset.skipped)))
    print("\n".join(outlook(config, machine.kind, "auto")))
    draw(path, config, dataset)
    return 0


def require_ours(path: Path) -> None:
    """Refuse to replace a file that this command did not write.

    Raises:
        InputError: there is such a one.
    """
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            ours = image.info.get("Software") == OURS
    except (OSError, SyntaxError, ValueError):
        ours = False
    require(ours, f"--out {path} is there, and was not written by {OURS}: name another")


def draw(path: Path, config: Config, dataset: Dataset) -> None:
    """Write the picture of what the network would see.

    Raises:
        InputError: it cannot be written.
    """
    note = PngImagePlugin.PngInfo()
    note.add_text("Software", OURS)
    save_picture(path, contact_sheet(config, dataset), pnginfo=note)
    print(f"{min(IMAGES, len(dataset))} of them as the network would see them: {path}")


def _what_it_is(facts: Facts) -> list[tuple[str, str]]:
    """Return what is said of the images as they lie there."""
    modes = ", ".join(f"{mode} {count:,}" for mode, count in facts.modes)
    spans = [span(name, values) for name, values in (("width", facts.widths), ("height", facts.heights))]
    return [("images", str(facts)), ("sizes", "; ".join(spans)), ("modes", modes)]


def span(name: str, values: tuple[int, int, int]) -> str:
    """Say the least, the median and the greatest of values; one of them where they are the same."""
    least, median, most = values
    return f"{name} {least}" if least == most else f"{name} {least} to {most}, {median} at the median"


def _what_is_in_it(data: DataConfig, dataset: Dataset) -> list[tuple[str, str]]:
    """Return what is said of the images once they are decoded."""
    said = [("classes", classes(dataset))] if dataset.labels is not None else []
    if dataset.skipped:
        said.append(("left out", f"{first(dataset.skipped)}; train needs --skip-bad for that"))
    pairs = near_duplicates(dataset.images)
    if pairs:
        names = names_of(data, dataset)
        copies = first([f"{names[later]} is like {names[earlier]}" for earlier, later in pairs])
        said.append(("copies", copies))
    return said


def first(entries: tuple[str, ...] | list[str]) -> str:
    """Say how many entries there are, and the first of them."""
    more = f" and {len(entries) - NAMED:,} more" if len(entries) > NAMED else ""
    return f"{len(entries):,}: {', '.join(entries[:NAMED])}{more}"


def classes(dataset: Dataset) -> str:
    """Say how many images each class has, the most frequent first."""
    assert dataset.labels is not None
    counted = Counter(dataset.labels.tolist()).most_common()
    known = dict(enumerate(dataset.classes))
    return first([f"{known.get(number, number)} {count:,}" for number, count in counted])


def names_of(data: DataConfig, dataset: Dataset) -> list[str]:
    """Return what each image is called: a file by its name, what has none by its number from 0."""
    source, _ = pictures_of(data)
    if source is None:
        return [f"image {number}" for number in range(len(dataset))]
    contents = source.look()
    # As names are printed where pictures are left out.
    names = [printable(contents.name(i)) for i in range(contents.count)]
    names = [name for name in names if not any(line.startswith(f"{name} (") for line in dataset.skipped)]
    if len(names) != len(dataset):
        raise InputError(f"--data {data.data} was changed while it was read: try again")
    return names
