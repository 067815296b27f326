"""How a test file lists the faults that it plants into the engine."""

from collections.abc import Callable
from typing import Any

import pytest

Plant = Callable[[pytest.MonkeyPatch], Any]


def list_of_faults() -> tuple[list[tuple[Plant, str, str]], Callable[[str, str], Callable[[Plant], Plant]]]:
    """Return an empty list of faults with their stages and files, and the decorator that adds to it."""
    faults: list[tuple[Plant, str, str]] = []

    def fault(stage: str, file: str) -> Callable[[Plant], Plant]:
        """Mark a function that plants a fault, which should be named by this stage and file."""

        def mark(plant: Plant) -> Plant:
            faults.append((plant, stage, file))
            return plant

        return mark

    return faults, fault
