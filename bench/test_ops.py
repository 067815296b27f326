"""Each op at the U-Net's shapes: the reference, what torch.compile makes of it, and the kernel."""

from collections.abc import Callable

import pytest

from bench.conftest import CLOCK, DEVICE, SIZES
from bench.work.ops import OpWork, builders, forms
from bench.work.scenarios import CONFIGURATIONS, loop_dtype

ON_A_GPU = DEVICE.type == "cuda"
BUILDERS = builders(CONFIGURATIONS[SIZES.ops.configuration], SIZES.ops.batch, loop_dtype(DEVICE), CLOCK, SIZES.norms)


@pytest.mark.parametrize("form", ["reference", "compiled reference", "kernel"] if ON_A_GPU else ["reference"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_op(time_op: Callable[..., None], build: Callable[[], OpWork], form: str) -> None:
    op_work = build()
    time_op(op_work, forms(op_work.op, kernels=ON_A_GPU, compiled=ON_A_GPU)[form])
