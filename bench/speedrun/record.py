"""What a race found, as a table, and the records that are kept in `profiles/speedrun.md`."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.report.tables import table
from bench.speedrun.loops import OURS
from bench.speedrun.race import Standing
from bench.speedrun.tracks import LEAST_DISTANCE, Track

HEAD = ["date", "commit", "machine", "track", "data", "seconds", "images", "scores", "what changed", "command"]


def shown(standings: Sequence[Standing], track: Track) -> str:
    """Return a table of where loops stood; the engine's first."""
    names = _score_names(track)
    rows = [
        [
            one.loop,
            str(one.seed),
            f"{one.seconds:.1f}",
            f"{one.steps:,}",
            f"{one.images:,}",
            *(f"{one.scores.get(name, float('nan')):.3g}" for name in names),
            f"{_distance(one):.2f}",
            "yes" if one.reached else "no",
        ]
        for one in sorted(standings, key=lambda one: (one.loop != OURS, one.loop, one.seed, one.seconds))
    ]
    head = ["loop", "seed", "seconds", "steps", "images", *(name.replace("_", " ") for name in names)]
    return "\n".join(table([*head, "distance to training images", "reached"], rows))


def _score_names(track: Track) -> list[str]:
    return [target.score for target in (*track.targets, track.second)]


def _distance(standing: Standing) -> float:
    """Return how far samples are from the nearest training image, as a share of held-out real images' distance."""
    return standing.scores["nearest_training"] / standing.scores["nearest_training_held_out"]


def verdict(standings: Sequence[Standing], track: Track) -> tuple[bool, str]:
    """Return whether the engine's runs, one a seed, make a record together, and the line that says why."""
    ours = [one for one in standings if one.loop == OURS]
    lines, passed = [], True
    for target in (*track.targets, track.second):
        mean = statistics.fmean(one.scores[target.score] for one in ours)
        passed &= target.met(mean)
        lines.append(f"{target}: {mean:.3g}" + ("" if target.met(mean) else " MISSED"))
    distance = statistics.fmean(_distance(one) for one in ours)
    passed &= distance >= LEAST_DISTANCE
    lines.append(f"distance to training images {distance:.2f} of held-out images'")
    return passed, "; ".join(lines)


def keep(page: Path, cells: Sequence[str]) -> None:
    """Add a record's row to the page, which is made where it is missing."""
    if not page.exists():
        page.write_text("\n".join(["# Records: training time to a stated quality", "", *table(HEAD, [])]))
    lines = page.read_text().rstrip("\n").split("\n")
    last = max(number for number, line in enumerate(lines) if line.startswith("|"))
    lines.insert(last + 1, "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    page.write_text("\n".join(lines) + "\n")
