"""Count what every step launches and add it to the page; see the package's docstring."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.launches import page, standin
from bench.timing.machine import commit


class Scenario(NamedTuple):
    """A step to capture."""

    task: str
    configuration: str
    batch: int
    ops: str

    @property
    def name(self) -> str:
        """Its heading on the page."""
        return f"{self.task} {self.configuration}, batch {self.batch}, {self.ops}"


SCENARIOS = [
    Scenario(task, configuration, batch, ops)
    for task, configuration, batch in (
        ("sampling", "cifar10", 256),
        ("sampling", "cifar10", 16),
        ("sampling", "cifar10", 1),
        ("training", "cifar10", 128),
        ("sampling", "digits", 64),
        ("training", "digits", 64),
    )
    for ops in ("kernels", "reference")
]


def observe(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Capture one step in a process of its own and return what it launched; `folder` holds the built stand-in."""
    printed = standin.run(folder, "bench.launches.scenario", *map(str, scenario))
    return json.loads(printed.strip().rpartition("\n")[2])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches")
    parser.add_argument("--label", required=True, help="of the page's new column; one of the same label is replaced")
    parser.add_argument("--out", type=Path, default=Path("profiles"), help="folder of the page")
    options = parser.parse_args()
    if reason := standin.reason_it_cannot_run():
        print(f"bench.launches: {reason}", file=sys.stderr)
        return 2
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        standin.build(Path(folder))
        for scenario in SCENARIOS:
            found[scenario.name] = observe(scenario, Path(folder))
            print(f"{scenario.name}: {found[scenario.name]['replays']} replays", flush=True)
    column = {"label": options.label, "commit": commit(), "date": time.strftime("%Y-%m-%d"), "scenarios": found}
    columns = [one for one in page.read(options.out / "launches-sm90.json") if one["label"] != options.label]
    page.write(options.out, [*columns, column])
    return 0


if __name__ == "__main__":
    sys.exit(main())
