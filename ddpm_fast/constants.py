"""What plain PyTorch and the Triton kernels must agree on, stated once. Both import it; it imports neither."""

from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class Stream(IntEnum):
    """What a random number is for: the low byte of the last word of Philox's counter (see `diffusion.noise`)."""

    TRAINING = 0
    SAMPLING = 1
    TIMESTEP = 2
    FLIP = 3
    DATA_ORDER = 4
    DROPOUT = 5
    LABEL = 6


CHANNEL_STEP = 256
"""The counter's last word is stream + CHANNEL_STEP * (channel // 4)."""


class Row(NamedTuple, Generic[Value]):
    """The columns of a sampler's table: the coefficients of the reverse step at the top of `diffusion.samplers`."""

    t: Value  # the timestep that the U-Net is told
    x0_from_x: Value
    x0_from_prediction: Value
    next_from_x0: Value
    next_from_x: Value
    next_from_prediction: Value
    next_from_x0_prev: Value
    noise: Value


class TrainingTable(NamedTuple, Generic[Value]):
    """The columns of the training table.

    x_t = signal * x_start + noise * eps, and the target is target_eps * eps + target_x_start * x_start.
    """

    signal: Value
    noise: Value
    target_eps: Value
    target_x_start: Value
    weight: Value  # of the example's squared error


class StepNumbers(NamedTuple, Generic[Value]):
    """What an update of the weights counts."""

    step: Value  # of the run, from 0; written before each update
    updates: Value  # of the weights so far, which Adam's moments average over
    bad_step: Value  # the first whose loss or gradient was not finite; -1 until then
    loss_steps: Value  # steps in loss_sum


class StepFigures(NamedTuple, Generic[Value]):
    """What an update of the weights says of itself."""

    learning_rate: Value
    gradient_norm: Value  # before clipping
    loss_sum: Value  # over the steps since it was last read


SAMPLER_COLUMN = Row(*range(len(Row._fields)))
TRAINING_COLUMN = TrainingTable(*range(len(TrainingTable._fields)))
STEP_NUMBER = StepNumbers(*range(len(StepNumbers._fields)))
STEP_FIGURE = StepFigures(*range(len(StepFigures._fields)))

ADAM_BETA1 = 0.9
ADAM_EPS = 1e-8
"""Kingma and Ba 2015's own settings, which the paper leaves as they are."""

GROUP_NORM_EPS = 1e-6
"""The paper's code adds this to the variance; PyTorch's default is ten times more."""


def drop_threshold(probability: float) -> int:
    """Return the random word below which dropout drops: an integer, so that all devices agree exactly."""
    return int(probability * 2**32)
