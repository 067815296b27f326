"""How long does training take to a stated quality, here, and beside others?

    python -m bench.speedrun digits
    python -m bench.speedrun mnist --data images.npz
    python -m bench.speedrun digits --seeds 0 --alone --steps 300      while choosing: any flag of train, one seed

trains the track's recipe and two plain diffusers loops in turns, once for each seed, and prints where each stood. With
`--what "what is new"` a record is added to profiles/speedrun.md, if it is one.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from bench.speedrun import record
from bench.speedrun.loops import OURS, PLAIN, RECIPE, build
from bench.speedrun.race import Standing, race
from bench.speedrun.tracks import JUDGED_WITH, TRACKS, Track, file_name, track_named
from bench.timing.machine import commit, device_name
from ddpm_fast.cli.arguments import TrainArguments
from ddpm_fast.cli.parsing import parse
from ddpm_fast.cli.waiting import wait_politely
from ddpm_fast.config import Config, with_training
from ddpm_fast.data.batches import split
from ddpm_fast.data.dataset import open_dataset
from ddpm_fast.engine.execution import choose_device
from ddpm_fast.engine.threads import choose_threads
from ddpm_fast.errors import InputError
from ddpm_fast.runs.scores import evaluator_of

PAGE = Path(__file__).parents[2] / "profiles" / "speedrun.md"


def parsed_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Parse this command's own flags; the rest is train's."""
    parser = argparse.ArgumentParser(prog="python -m bench.speedrun", description="Race to a stated quality.")
    parser.add_argument("track", help=f"what is raced for: {', '.join(TRACKS)}")
    parser.add_argument("--data", default="", help="a .npy/.npz file or a folder of images; digits has its own")
    parser.add_argument("--seeds", type=int, nargs="+", default=JUDGED_WITH, help="default: the judges' three")
    parser.add_argument("--alone", action="store_true", help="without the plain loops")
    parser.add_argument("--what", default="", help="what is new: keeps a record in profiles/speedrun.md")
    return parser.parse_known_args()


def run(config: Config, track: Track, names: list[str], seeds: list[int]) -> list[Standing]:
    """Race once for each seed, saying where loops stand as soon as that is known."""
    dataset = open_dataset(config.data, config.unet)
    trained = dataset.images[split(len(dataset), config.data.holdout)[0].numpy()]
    evaluator = evaluator_of(config, dataset)
    if evaluator.missing:
        raise InputError(f"track {track.name}: {evaluator.missing}; give a .npz with images and labels")
    standings: list[Standing] = []
    for seed in seeds:
        seeded = with_training(config, seed=seed)
        loops = {name: build(name, seeded, dataset, trained) for name in names}
        for standing in race(loops, track, evaluator.score):
            standings.append(standing)
            scores = ", ".join(f"{target.score} {standing.scores[target.score]:.3g}" for target in track.targets)
            print(f"seed {seed}: {standing.loop} after {standing.seconds:.1f} s: {scores}", flush=True)
    return standings


def main() -> int:
    """Race, print, and keep a record if it is one."""
    asked, flags = parsed_arguments()
    track = track_named(asked.track)
    config = parse(TrainArguments, flags, TrainArguments(config=track.config(asked.data)), "speedrun").config
    device = choose_device(config.training.device)
    if device.type == "cpu":
        choose_threads()
    standings = run(config, track, [OURS] if asked.alone else [OURS, PLAIN, RECIPE], list(asked.seeds))
    print("\n" + record.shown(standings, track))
    passed, line = record.verdict(standings, track)
    print(line)
    ours = [one for one in standings if one.loop == OURS]
    seconds = sum(one.seconds for one in ours) / len(ours)
    if not asked.what:
        return 0
    if not passed or tuple(asked.seeds) != JUDGED_WITH:
        print("not a record: a target is missed, or other seeds were raced", file=sys.stderr)
        return 1
    data = ["--data", file_name(asked.data)] if asked.data else []
    command = shlex.join(["python", "-m", "bench.speedrun", track.name, *data, *flags])
    images = f"{ours[0].images:,}"
    cells = [time.strftime("%Y-%m-%d"), commit(), device_name(device), track.name, file_name(config.data.data)]
    record.keep(PAGE, [*cells, f"{seconds:.1f}", images, line, asked.what, f"`{command}`"])
    return 0


if __name__ == "__main__":
    wait_politely()
    try:
        sys.exit(main())
    except InputError as error:
        print(f"bench.speedrun: {error}", file=sys.stderr)
        sys.exit(2)
