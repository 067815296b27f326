"""The stages that the check holds a run's mathematics to."""

from typing import Literal

# fmt: off
Stage = Literal[
    "data", "order", "labels", "timesteps", "flip", "noise", "schedule", "q_sample",  # up to x_t
    "weights", "network", "dropout", "target", "loss", "gradient", "clipping", "optimizer", "ema", "fit",  # training
    "sampler", "variance", "pixels", "checkpoint", "kernels", "configuration",  # sampling, and the whole
]
# fmt: on
"""What is checked, in the order in which a run goes through it."""
