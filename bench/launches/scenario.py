"""Capture one of the engine's steps with the stand-in in CUDA's place, and print what it launched as JSON.

    python -m bench.launches.scenario sampling|training CONFIGURATION BATCH kernels|reference

is what `standin.run` starts.
"""

import json
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.launches.kinds import count
from bench.launches.operators import standing_in
from bench.launches.record import Entry, captures, note, recorded
from bench.work.scenarios import CONFIGURATIONS, Variant, sampling, train_step
from ddpm_fast.engine.sampling import GRAPH_STEPS, SamplingLoop
from ddpm_fast.engine.trainer import WARM_UP_STEPS

REST = 3
"""Steps of the sampling loop after whole graphs, which replay the one-step graph."""


def _sampling(configuration: str, batch: int, variant: Variant) -> tuple[list[Entry], list[Entry], list[Entry]]:
    steps = 2 * GRAPH_STEPS + REST
    # The stand-in computes no values to compare.
    with mock.patch.object(SamplingLoop, "_compare"), recorded() as first:
        scenario = sampling(CONFIGURATIONS[configuration], batch, steps, variant, torch.device("cuda"))
        scenario.work()
    with recorded() as again:
        scenario.work()
    one_step, _ = captures(first)
    return first, one_step, again


def _training(configuration: str, batch: int, variant: Variant) -> tuple[list[Entry], list[Entry], list[Entry]]:
    backward = Tensor.backward

    def noting_backward(loss: Tensor) -> None:
        note("phase", "backward")
        backward(loss)
        note("phase", "update")

    with mock.patch.object(Tensor, "backward", noting_backward), recorded() as first:
        scenario = train_step(CONFIGURATIONS[configuration], batch, variant, torch.device("cuda"))
        for _ in range(WARM_UP_STEPS + 1):
            scenario.work()
    with recorded() as again:
        scenario.work()
    (step,) = captures(first)
    return first, step, again


def observe(task: str, configuration: str, batch: int, kernels: bool) -> dict[str, Any]:
    """Build, capture and replay a step.

    Returns:
        "kinds": launches and bytes of the captured step by kind; "refused": what a capture would not have allowed;
        "waits" and "replays" of the next call, once all is captured; "atomics": compiled kernels that add atomically.
    """
    variant = Variant(kernels, "captured")
    with standing_in():
        first, step, again = (_sampling if task == "sampling" else _training)(configuration, batch, variant)
    return {
        "kinds": count(step),
        "refused": [" ".join(entry.values) for entry in first + again if entry.event == "refused"],
        "waits": [" ".join(entry.values) for entry in again if entry.event == "wait"],
        "replays": sum(entry.event == "replay" for entry in again),
        "atomics": [" ".join(entry.values) for entry in step if entry.event == "atomic"],
    }


if __name__ == "__main__":
    print(json.dumps(observe(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "kernels")))
