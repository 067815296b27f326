"""One optimizer step, from the batch's gathering to the averaged weights."""

from collections.abc import Callable
from functools import partial

import pytest

from bench.conftest import DEVICE, SIZES, VARIANTS
from bench.report.sizes import Training
from bench.work.scenarios import CONFIGURATIONS, Variant, train_step


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("size", SIZES.training, ids=lambda size: f"{size.configuration}-batch{size.batch}")
def test_train_step(time_scenario: Callable[..., None], size: Training, variant: Variant) -> None:
    time_scenario(partial(train_step, CONFIGURATIONS[size.configuration], size.batch, variant, DEVICE), variant)
