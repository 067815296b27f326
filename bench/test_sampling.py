"""One batch of images from noise: 1000 steps of the paper's sampler on a GPU, fewer of the same on a CPU."""

from collections.abc import Callable
from functools import partial

import pytest

from bench.conftest import DEVICE, SIZES, VARIANTS
from bench.report.sizes import Sampling
from bench.work.scenarios import CONFIGURATIONS, Variant, sampling


def name(size: Sampling) -> str:
    return f"{size.configuration}-batch{size.batch}-{size.steps}steps"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("size", SIZES.sampling, ids=name)
def test_sampling(time_scenario: Callable[..., None], size: Sampling, variant: Variant) -> None:
    time_scenario(
        partial(sampling, CONFIGURATIONS[size.configuration], size.batch, size.steps, variant, DEVICE), variant
    )
