"""How likely is it, if the numbers are what they claim to be, that they look as they do?

Every statistic ends in one currency, the chance of a value as extreme as the one that was found, so that one bound
serves all. Seeds make draws repeatable: what passes once passes always.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ddpm_fast.checks.results import CheckResult, Stage, judged

RARE = 1e-9
"""A rarer statistic is called wrong. A check has about a hundred: one right configuration in ten million is refused."""
MOST_REPEATED = 1e-4
"""Share of numbers that may occur twice: by chance it is far smaller, by a fault a sixteenth or more."""
CLASSES = 8
"""Equally likely classes into which numbers are sorted, to see whether two of them go together."""


def of_sigmas(sigmas: float) -> float:
    """Return the chance that a normal number lies as many standard deviations from its mean."""
    return math.erfc(abs(sigmas) / math.sqrt(2)) if math.isfinite(sigmas) else 0.0


def most_by_chance(variance: float, largest: float) -> float:
    """Return how far from 0 a sum of independent numbers of mean 0 lies at most, but RARE times (Bernstein 1924).

    Unlike a number of standard deviations, this holds for few numbers and for rare events, too.

    Args:
        variance: of the sum.
        largest: size of one number.
    """
    exponent = math.log(2 / RARE)
    return largest * exponent / 3 + math.sqrt((largest * exponent / 3) ** 2 + 2 * variance * exponent)


def of_counts(counts: Tensor, shares: Tensor) -> float:
    """Return the chance of counts whose expected shares are given (Pearson's chi-square test)."""
    if len(counts) == 1:
        return 1.0
    expected = shares.double() * counts.sum()
    distance = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.as_tensor((len(counts) - 1) / 2).double(), distance.cpu() / 2))


def of_normal(z: Tensor) -> dict[str, float]:
    """Return the chances of numbers that should be N(0, 1): of mean, variance and distribution (Kolmogorov-Smirnov)."""
    ordered = z.double().flatten().sort().values
    n = len(ordered)
    expected, ranks = torch.special.ndtr(ordered), torch.arange(n + 1, dtype=torch.float64, device=z.device) / n
    distance = float(torch.maximum((ranks[1:] - expected).max(), (expected - ranks[:-1]).max()))
    mean, square = float(ordered.mean()), float(ordered.square().mean())
    return {
        f"mean {mean:.3f}": of_sigmas(mean * math.sqrt(n)),
        f"variance {square:.3f}": of_sigmas((square - 1) * math.sqrt(n / 2)),
        f"distribution, {distance:.4f} off": min(1.0, 2 * math.exp(-2 * n * distance**2)),
    }


def classes_of_normal(z: Tensor) -> Tensor:
    """Sort N(0, 1) into equally likely classes: int64 of the same shape."""
    return (torch.special.ndtr(z) * CLASSES).long().clamp(0, CLASSES - 1)


def classes_of_integers(t: Tensor, total: int) -> Tensor:
    """Sort integers 0..total-1 into classes of about the same size."""
    return t.clamp(0, total - 1) * min(CLASSES, total) // total


def shares_of_integers(total: int, shares: Tensor | None = None) -> Tensor:
    """Return how likely each class of `classes_of_integers` is; each integer has its share [total], or the same."""
    weights = torch.full((total,), 1 / total, dtype=torch.float64) if shares is None else shares
    return classes_of_integers(torch.arange(total), total).bincount(weights)


def of_independence(a: Tensor, b: Tensor, shares_a: Tensor | None = None, shares_b: Tensor | None = None) -> float:
    """Return the chance of two equally shaped tensors of classes, if neither tells anything about the other.

    Any dependence shows, not only correlation. Classes are CLASSES equally likely ones unless shares are given.
    """
    uniform = torch.full((CLASSES,), 1 / CLASSES)
    shares_a, shares_b = (uniform if shares is None else shares for shares in (shares_a, shares_b))
    kinds = len(shares_b)
    together = (a.flatten() * kinds + b.flatten()).bincount(minlength=len(shares_a) * kinds).cpu()
    shares = torch.outer(shares_a.double(), shares_b.double()).flatten()
    return of_counts(together, shares)


def share_repeated(draws: Iterable[Tensor]) -> float:
    """Return which share of the pairs of channels (0 with 1, 2 with 3) of draws [..., 4, H, W] occurred before."""
    words = torch.cat([z.movedim(-3, -1).float().flatten() for z in draws])
    pairs = words.view(torch.int64)  # two floats are taken as one number
    return 1 - len(pairs.unique()) / len(pairs)


def likely(stage: Stage, name: str, expected: str, chances: Mapping[str, float], file: str) -> CheckResult:
    """Judge several statistics; the first that is too rare is told."""
    rare = [statistic for statistic, chance in chances.items() if not chance >= RARE]
    found = f"{rare[0]}: by chance once in {1 / max(chances[rare[0]], 1e-300):.0e}" if rare else "just that"
    return CheckResult(stage, name, judged(not rare), expected, found, file)
