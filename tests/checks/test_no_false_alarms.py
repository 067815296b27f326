"""No valid configuration is called wrong, and none is called CHANGED but for what its own flags ask for."""

from typing import Any

import pytest
import torch

from ddpm_fast import textbook
from ddpm_fast.checks.results import CheckResult, Verdict
from ddpm_fast.checks.suite import check_run
from ddpm_fast.checks.tables import ENDS_IN_NOISE, NOTHING
from ddpm_fast.config import Config
from ddpm_fast.data.dataset import open_dataset
from tests.checks.valid_configurations import make

CONFIGURATIONS = 200


def is_meant(result: CheckResult, config: Config) -> bool:
    """Whether a line is right, or says what is true of its flags.

    That is: a value is unlike its preset's, a schedule ends before it is noise, or so late that float32 has no number
    for 1 / sqrt(alpha_bar), which makes the engine's images infinite.
    """
    last = float(textbook.ForwardProcess(config.diffusion).alpha_bar[-1])
    true = result.stage == "configuration"
    true |= last >= ENDS_IN_NOISE and result.name == "the schedule ends in noise"
    true |= last < NOTHING and result.name.endswith(": images are finite")
    return result.verdict is Verdict.RIGHT or (result.verdict is Verdict.CHANGED and true)


NUMBERS: list[Any] = list(range(CONFIGURATIONS))
NUMBERS[157] = pytest.param(
    157,
    marks=pytest.mark.xfail(
        reason="two nearly equal numbers make a group of its lowest level's norm: rounding is 3e-3 of a gradient, "
        "and the textbook in float32, the measure, happens to round a hundred times less, on some processors",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_valid_configuration_raises_no_alarm(number, tmp_path):
    config = make(number, tmp_path)
    results = check_run(config, open_dataset(config.data, config.unet), torch.device("cpu"))
    assert [result for result in results if not is_meant(result, config)] == [], config
