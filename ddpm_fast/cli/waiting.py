"""How a CPU's threads wait for each other: decided before PyTorch is loaded, which asks only once."""

import os

SPINS = 30_000
"""Turns, well under a millisecond, that a thread waits awake before it sleeps. PyTorch's OpenMP, GNU's, takes
300,000, also for a thread that has no core: on two cores under a load of 9, a step of digits on two threads took 4.6 s,
and 0.7 s with 10,000. On two quiet cores it takes 3% longer with 10,000 than with GNU's number, and 1% longer with
30,000 (medians of 11 and 12 pairs of 60 steps, in turns)."""
USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_politely() -> None:
    """Let threads that have nothing to do sleep soon, unless the user has decided how they wait."""
    if not any(name in os.environ for name in USERS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
