"""How a CPU's threads wait for each other: decided before PyTorch is loaded, which asks only once."""

import os

SPINS = 10_000
"""Turns, some hundred microseconds, that a thread waits awake before it sleeps. PyTorch's OpenMP, GNU's, takes 300,000:
where another process needs a core, a step of digits on two threads then took 4.6 s, so 0.7 s, and 0.4 s on one thread
(medians of 2 to 30 steps, by turns, two cores under a load of 9)."""
USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_politely() -> None:
    """Let threads that have nothing to do sleep soon, unless the user has decided how they wait."""
    if not any(name in os.environ for name in USERS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
