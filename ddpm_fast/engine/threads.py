"""How many threads a CPU computes with: all, unless a measurement says that fewer are clearly faster.

They are where other processes take cores: every part of an op waits for its slowest thread.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

SECONDS = 0.4
"""That measuring may take, and then finishes its round."""
ROUNDS = 7
CLEARLY = 1.25
"""How many times faster fewer threads must be: the number of threads changes how sums are rounded."""
USERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""The user's own choice."""


def choose_threads() -> int:
    """Set and return the number of threads that PyTorch computes with on the CPU."""
    if not any(name in os.environ for name in USERS):
        torch.set_num_threads(fastest(candidates(torch.get_num_threads()), _block_of_digits()))
    return torch.get_num_threads()


def candidates(all_threads: int) -> list[int]:
    """Return the numbers of threads that are tried, all first."""
    return list(dict.fromkeys([all_threads, max(1, all_threads // 2), 1]))


def fastest(numbers: list[int], work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> int:
    """Return the number of threads at which work is done fastest: the first, unless another is clearly faster.

    All take their turns in every round, since what else the machine does may change meanwhile.
    """
    if len(numbers) == 1:
        return numbers[0]
    seconds, started = {number: list[float]() for number in numbers}, clock()
    for round_number in range(1 + ROUNDS):
        for number in numbers:
            torch.set_num_threads(number)
            before = clock()
            work()
            if round_number:  # in the first, threads start and memory is taken
                seconds[number].append(clock() - before)
        if round_number and clock() - started > SECONDS:
            break
    typical = {number: statistics.median(taken) for number, taken in seconds.items()}
    best = min(numbers, key=lambda number: typical[number])
    return best if typical[best] * CLEARLY < typical[numbers[0]] else numbers[0]


def _block_of_digits() -> Callable[[], object]:
    """Return work like that of a small U-Net's block, forwards and backwards: milliseconds, in many short parts."""
    x = torch.full((64, 32, 8, 8), 0.5).contiguous(memory_format=torch.channels_last)
    weight = torch.full((32, 32, 3, 3), 0.01, requires_grad=True)

    def work() -> None:
        h = x
        for _ in range(2):
            h = F.conv2d(F.silu(F.group_norm(h, 8)), weight, padding=1)
        h.sum().backward()

    return work
