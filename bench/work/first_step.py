"""How long a user waits for the first step: from starting Python to the first training or sampling step's end.

    python -m bench.work.first_step train|sample CONFIGURATION BATCH

is what is timed, twice in processes of their own: cold, with every compile cache empty, and warm, with what the first
left behind.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from bench.timing.clock import clock_for
from bench.work.scenarios import CONFIGURATIONS, default_variant, sampling, train_step
from ddpm_fast.engine.execution import choose_device, disable_malloc_trim

Kind = Literal["train", "sample"]

CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
"""Where PyTorch, Triton, the driver and the engine keep what they compiled."""


def first_step(kind: Kind, configuration: str, batch: int) -> None:
    """Run one step and print its seconds and the time of day at its end."""
    disable_malloc_trim()
    device = choose_device("auto")
    config, variant = CONFIGURATIONS[configuration], default_variant(device)
    start = time.monotonic()
    if kind == "train":
        scenario = train_step(config, batch, variant, device)
    else:
        scenario = sampling(config, batch, 1, variant, device)
    clock_for(device).seconds(scenario.work)
    print(json.dumps({"step_seconds": time.monotonic() - start, "end": time.time()}))


def time_first_step(kind: Kind, configuration: str, batch: int, timeout: float = 600) -> dict[str, float]:
    """Return the seconds from a process's start to its first step's end, cold and warm, and of these the step's own.

    Raises:
        RuntimeError: the process failed; its last line says why.
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "bench.work.first_step", kind, configuration, str(batch)]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, **{name: f"{caches}/{name}" for name in CACHES}}
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [environment.get("PYTHONPATH")])])
        for state in ("cold", "warm"):
            start = time.time()
            result = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=root, env=environment, timeout=timeout
            )
            if result.returncode:
                raise RuntimeError(result.stderr.strip().rpartition("\n")[2])
            values = json.loads(result.stdout.strip().rpartition("\n")[2])
            found[f"{state}_seconds"] = values["end"] - start
            found[f"{state}_step_seconds"] = values["step_seconds"]
    return found


if __name__ == "__main__":
    first_step("train" if sys.argv[1] == "train" else "sample", sys.argv[2], int(sys.argv[3]))
