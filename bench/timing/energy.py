"""Joules that a GPU used, by the counter that NVIDIA's driver keeps (NVML)."""

import time
from collections.abc import Callable

import torch

from bench.timing.clock import Clock, Work


class EnergyMeter:
    """Reads a device's energy counter, or says why there is none."""

    def __init__(self, read_joules: Callable[[], float] | None, reason: str = "") -> None:
        """Take a counter in joules that only rises; None with the reason where there is none."""
        self._read_joules, self.reason = read_joules, reason

    def joules_per_call(self, work: Work, clock: Clock, seconds: float = 1.0) -> float | None:
        """Run warm work for at least `seconds` and return the joules that a call took. None: see `reason`."""
        if self._read_joules is None:
            return None
        clock.synchronize()
        start, before, calls = time.monotonic(), self._read_joules(), 0
        while time.monotonic() - start < seconds:
            work()
            clock.synchronize()
            calls += 1
        return (self._read_joules() - before) / calls


def energy_meter(device: torch.device) -> EnergyMeter:
    """Return the meter of a device."""
    if device.type != "cuda":
        return EnergyMeter(None, "NVML measures NVIDIA GPUs only")
    try:
        import pynvml
    except ImportError:
        return EnergyMeter(None, "nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
        # By UUID: NVML numbers all GPUs, PyTorch those that CUDA_VISIBLE_DEVICES leaves.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return EnergyMeter(None, f"NVML: {error}")
    # In millijoules. The driver renews it about ten times a second, so that a second is told to a tenth.
    return EnergyMeter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
