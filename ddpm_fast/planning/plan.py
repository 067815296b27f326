"""A run planned from its data, its machine and the time that it may take: the preset `auto`.

The rules follow from the runs that are known to be good: the preset `digits`, measured choice by choice
(profiles/speedrun.md), and the paper's for 32 and 256 pixels. Between them is guessed, by the simplest formula.
Whatever the user fixes stays, and the rest is planned around it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import floor, log10, sqrt
from typing import NamedTuple, TypeVar

from ddpm_fast.config import Config, DataConfig, UNetConfig
from ddpm_fast.data.survey import Facts
from ddpm_fast.engine.speed import Machine
from ddpm_fast.options import Wanted
from ddpm_fast.planning.cost import memory, seconds_per_image
from ddpm_fast.presets import AUTO

T = TypeVar("T")

PLANNED = (
    *("image_channels", "height", "width", "channels", "channel_multipliers", "res_blocks"),
    *("attention_resolutions", "groups", "steps", "batch_size", "accumulate", "learning_rate", "warmup_steps"),
    *("ema_decay", "save_every", "sample_every"),
)
"""The flags whose values are planned."""
MINUTES = {"cpu": 60.0, "cuda": 240.0}
"""That a run may take where nobody says otherwise."""
SIZES = (8, 12, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256)
"""Heights and widths of an image, which are the same: none is enlarged, and of others the centre is cut out."""
NETWORKS = ((16, 1), (32, 1), (48, 1), (64, 1), (64, 2), (96, 2), (128, 2))
"""Channels and ResBlocks per level, up to the paper's."""
LEAST_CHANNELS, MOST_CHANNELS = 0.5, 4
"""Per pixel of height, as far as there are such networks: digits' 8 pixels have 32, the paper's 32 have 128."""
MULTIPLIERS = {1: (1,), 2: (1, 2), 3: (1, 2, 4), 4: (1, 2, 2, 2), 5: (1, 1, 2, 2, 4), 6: (1, 1, 2, 2, 4, 4)}
"""By the number of levels; 2, 4 and 6 are those of `digits`, `cifar10` and `church256`."""
DEEPER_ABOVE = (64, 128)
"""Pixels above which there may be a fifth and a sixth level: the lowest is then 8 pixels high, or a little less."""
LEAST_HEIGHT = 4
"""Of the lowest level, in pixels."""
ATTENTION_UP_TO, ATTENTION_FROM = 16, 32
"""Height, in pixels, of the highest feature map with attention, as in the paper; and channels of a network with any."""
IMAGES_NEEDED = 7
"""Times the height in pixels to the power of 3/2, and the channels to the power of 3/2. That is 29,000 for `digits`,
which is good after 22,400; and 66,000 for 28x28 grey pixels and 16 channels, where of `mnist` after 32,000 every second
digit can be read."""
IN_COLOUR = 2
"""Times as many for coloured images, at least: 80,000 for 20x20 pixels and 160,000 for 32x32, with 16 channels, where
emoji after 31,000 were blobs, and after 48,000 (`icons32`) outlines and colours. Where they are good is unmeasured."""
MOST_TIMES = 10
"""The images that are needed, so many times, are enough."""
MOST_EPOCHS = 2000
"""And so many times all there are."""
LEAST_BATCH, MOST_BATCH, BATCHES = 32, 256, 4000
"""A batch as small as that of `digits`, unless that makes more steps than these."""
MEMORY_SHARE = 0.7
"""Of what is free; the images themselves lie there, too."""
FEW_IMAGES = 1000
"""Fewer than these are soon known by heart."""


def plan(facts: Facts, machine: Machine, data: DataConfig, wanted: Wanted, minutes: float = 0) -> Config:
    """Plan a run.

    Args:
        facts: of the images.
        machine: that it is to run on.
        data: where the images come from.
        wanted: what the user fixed.
        minutes: that it may take; 0 is an hour on a CPU and four on a GPU.

    Raises:
        InputError: what the user fixed does not fit together.
    """
    planner = _Planner(facts, machine, wanted, 60 * (minutes or MINUTES[machine.kind]))
    unet = planner.network()
    batch, steps, accumulate = planner.batches(unet)
    every = max(1, steps // 10)
    training = replace(
        AUTO.training,
        steps=steps,
        batch_size=batch,
        accumulate=accumulate,
        learning_rate=_round(2e-3 * min(1, 32 / unet.channels) * min(1, 32 / min(unet.height, unet.width))),
        warmup_steps=min(5000, round(_round(max(1.0, steps / 14)))),
        ema_decay=round(1 - _round(1 / max(2.0, 7.5 * sqrt(steps)), 1), 6),  # 0.93, and not 0.9299999999999999
        save_every=every,
        sample_every=every,
        device=wanted.device,
        precision=wanted.precision,
    )
    return replace(AUTO, unet=unet, data=data, training=training)


def remarks(config: Config, facts: Facts) -> list[str]:
    """Say what of a plan the user may want otherwise."""
    unet, training, said = config.unet, config.training, list[str]()
    needed = needed_images(unet)
    if training.steps * training.batch_size < 0.9 * needed:
        said.append(
            f"what it makes will be rough: it sees {training.steps * training.batch_size:,} images, and "
            f"{unet.height}x{unet.width} pixels take about {needed:,}: more --minutes, or a smaller --height, help"
        )
    if facts.count < FEW_IMAGES:
        said.append(
            f"{facts.count} image{'s are' if facts.count > 1 else ' is'} soon known by heart: --holdout 0.1 shows when"
        )
    if facts.transparent and unet.image_channels in (1, 3):
        said.append("what is transparent becomes white: --image-channels 4 learns transparency, too")
    if not config.data.flip:
        said.append("nothing is flipped: add --flip where left and right do not matter, as in most photos")
    return said


def needed_images(unet: UNetConfig) -> int:
    """Return how many images a run must see, at least, for good ones."""
    coloured = IN_COLOUR if unet.image_channels >= 3 else 1
    return round(_round(coloured * IMAGES_NEEDED * min(unet.height, unet.width) ** 1.5 * unet.channels**1.5))


class Batches(NamedTuple):
    """How the images of a run are taken."""

    size: int
    steps: int
    accumulate: int


class _Planner:
    def __init__(self, facts: Facts, machine: Machine, wanted: Wanted, seconds: float) -> None:
        self.facts, self.machine, self.wanted, self.seconds = facts, machine, wanted, seconds

    def network(self) -> UNetConfig:
        """Return the largest images that can be learnt in time, and the widest network that learns them."""
        size = _last([self._networks(*size)[0] for size in self._sizes()], self._is_affordable)
        return _last(self._networks(size.height, size.width), self._is_affordable)

    def batches(self, unet: UNetConfig) -> Batches:
        """Return how the images that can be seen in time, and no more than are of use, are taken."""
        images = min(self._images(unet), MOST_TIMES * needed_images(unet))
        size = self.wanted.batch_size or min(
            MOST_BATCH, max(LEAST_BATCH, 2 ** floor(log10(images / BATCHES) / log10(2)))
        )
        steps = self.wanted.steps or max(1, floor(_round(images / size, 2, floor)))
        return Batches(size, steps, self.wanted.accumulate or self._parts(unet, size))

    def _sizes(self) -> Sequence[tuple[int, int]]:
        height, width = self.wanted.height, self.wanted.width
        if height or width:
            return [(height or width or 0, width or height or 0)]
        return [(size, size) for size in SIZES if size <= self.facts.side] or [(SIZES[0], SIZES[0])]

    def _networks(self, height: int, width: int) -> Sequence[UNetConfig]:
        """Return the networks for images of a size, the narrowest first."""
        channels, least = self.wanted.channels, LEAST_CHANNELS * min(height, width)
        sized = [
            (wide, blocks) for wide, blocks in NETWORKS if min(least, 64) <= wide <= MOST_CHANNELS * min(height, width)
        ]
        networks = [(channels, 1 if channels <= 64 else 2)] if channels else sized
        blocks = self.wanted.res_blocks
        return [self._unet(height, width, *network) for network in dict.fromkeys((w, blocks or b) for w, b in networks)]

    def _unet(self, height: int, width: int, channels: int, res_blocks: int) -> UNetConfig:
        wanted = self.wanted
        multipliers = wanted.channel_multipliers or MULTIPLIERS[_levels(height, width)]
        attention = [height >> level for level in range(1, len(multipliers))]
        has_attention = channels >= ATTENTION_FROM
        highest = tuple(high for high in attention if has_attention and LEAST_HEIGHT <= high <= ATTENTION_UP_TO)[:1]
        groups = next(groups for groups in range(min(32, max(1, channels // 4)), 0, -1) if channels % groups == 0)
        return UNetConfig(
            image_channels=wanted.image_channels or (1 if self.facts.grey else 3),
            height=height,
            width=width,
            channels=channels,
            channel_multipliers=multipliers,
            res_blocks=res_blocks,
            attention_resolutions=highest if wanted.attention_resolutions is None else wanted.attention_resolutions,
            groups=wanted.groups or groups,
        )

    def _images(self, unet: UNetConfig) -> float:
        """Return how many images can be seen in time, and usefully."""
        in_time = self.seconds / seconds_per_image(unet, self.machine)
        return max(1.0, min(in_time, MOST_EPOCHS * self.facts.count))

    def _is_affordable(self, unet: UNetConfig) -> bool:
        return self._images(unet) >= needed_images(unet) and self._fits(unet, 1)

    def _fits(self, unet: UNetConfig, images: int) -> bool:
        return memory(unet, images, self.machine.kind) <= MEMORY_SHARE * self.machine.memory

    def _parts(self, unet: UNetConfig, batch: int) -> int:
        """Return the least number of equal parts of a batch that fit into memory; all one by one where none does."""
        return next(
            (parts for parts in range(1, batch) if batch % parts == 0 and self._fits(unet, batch // parts)), batch
        )


def _levels(height: int, width: int) -> int:
    """Return how many levels a U-Net for images of this size has."""
    smaller, levels = min(height, width), 1
    most = 4 + sum(smaller > above for above in DEEPER_ABOVE)
    while levels < most and height % 2**levels == width % 2**levels == 0 and smaller >> levels >= LEAST_HEIGHT:
        levels += 1
    return levels


def _last(ascending: Sequence[T], fits: Callable[[T], bool]) -> T:
    """Return the last that fits of what fits less and less; the first where none does."""
    low, high = 0, len(ascending) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(ascending[middle]) else (low, middle - 1)
    return ascending[low]


def _round(value: float, digits: int = 2, rounding: Callable[[float], int] = round) -> float:
    """Round to so many digits that count."""
    unit = 10.0 ** (floor(log10(value)) - digits + 1)
    return float(f"{rounding(value / unit + 1e-9) * unit:.{digits}g}")
