"""What a run says while it trains: a bar in a terminal, elsewhere lines; an outlook, as soon as steps are timed.

Only time spent on steps counts for speed and time left: not the seconds in which grids are drawn or states saved.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tqdm import tqdm

from ddpm_fast.config import Config
from ddpm_fast.model.unet import UNet
from ddpm_fast.presets import AUTO, PRESETS
from ddpm_fast.progress import LINE_SECONDS, duration, lines_wanted, say

LEAST_SECONDS = 3.0
"""Between two lines, however often something is logged."""
LONG_SECONDS = 900.0
"""A run that will take longer says so once its steps are timed, and names a shorter one."""
TIMED_SECONDS = 2.0
"""Training from which an outlook is taken: a first step has its own overhead."""
INTERVALS = 4
"""Of logging, whose mean is the present speed."""
SHORTER = "digits"
"""The preset that a long run is told of."""


class Mark(NamedTuple):
    """A step, and the seconds of training until it was done."""

    step: int
    seconds: float


class TrainingProgress:
    """Counts a run's steps and times them; a context."""

    def __init__(self, config: Config, step: int, untimed_steps: int, bar: bool) -> None:
        """Prepare to count.

        Args:
            config: the run's.
            step: steps taken before.
            untimed_steps: first ones, which compile and capture, and tell nothing about those that follow.
            bar: show one.
        """
        self.config, self.step, self._first_step, self._untimed = config, step, step, untimed_steps
        self._show_bar, self._lines, self._outlook_given = bar, lines_wanted(bar), False
        self._took = dict[str, float]()
        self._start(tqdm(disable=True))

    def _start(self, bar: tqdm) -> None:
        self.bar, self._paused_seconds = bar, 0.0
        self._started = self._last_line = time.perf_counter()
        self._marks, self._interval = deque([Mark(self.step, 0.0)], maxlen=INTERVALS), Mark(self.step, 0.0)

    def __enter__(self) -> "TrainingProgress":
        total = self.config.training.steps
        self._start(tqdm(total=total, initial=self.step, unit="step", desc="training", disable=not self._show_bar))
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    @property
    def training_seconds(self) -> float:
        """Time spent on steps so far."""
        return time.perf_counter() - self._started - self._paused_seconds

    @property
    def seconds_per_step(self) -> float:
        """At the present speed; 0 until a step is timed."""
        since = self._marks[0]
        return (self.training_seconds - since.seconds) / (self.step - since.step) if self.step > since.step else 0.0

    @contextmanager
    def doing(self, what: str, seconds: float = 0.0) -> Iterator[None]:
        """Name what is done instead of training, whose time stands still.

        Args:
            what: as "saving step 300".
            seconds: that it is expected to take: what takes long is said in any case.
        """
        started, kind = time.perf_counter(), what.split()[0]
        self.bar.set_description(what)
        # What was quick the last time is not said again.
        expected = max(seconds, self._took.get(kind, started - self._last_line))
        if self._lines and expected >= LEAST_SECONDS:
            self._say(what)
        try:
            yield
        finally:
            self.bar.set_description("training", refresh=False)
            self._took[kind] = time.perf_counter() - started
            self._paused_seconds += self._took[kind]

    def step_done(self) -> None:
        """Count a step."""
        self.step += 1
        self.bar.update()
        if self._untimed:
            self._untimed -= 1
            self._marks = deque([Mark(self.step, self.training_seconds)], maxlen=INTERVALS)
        elif not self._outlook_given and self.training_seconds - self._marks[0].seconds >= TIMED_SECONDS:
            self._outlook_given = True
            self._give_outlook()

    def end_interval(self) -> tuple[float, float]:
        """End a logging interval; return its seconds of training and the images per second in it."""
        now, before = Mark(self.step, self.training_seconds), self._interval
        self._interval = now
        self._marks.append(now)
        seconds = max(now.seconds - before.seconds, 1e-9)
        return seconds, (now.step - before.step) * self.config.training.batch_size / seconds

    def line_due(self) -> bool:
        """Return whether so much time passed that something is to be said between two logging intervals."""
        return time.perf_counter() - self._last_line >= LINE_SECONDS

    def report(self, facts: str) -> None:
        """Say where the run is, unless something was said just now; the last step is always said.

        Args:
            facts: of the step, as "loss 0.0412".
        """
        self.bar.set_postfix_str(facts)
        total, since = self.config.training.steps, time.perf_counter() - self._last_line
        if self._lines and (since >= LEAST_SECONDS or self.step == total):
            pace = self.seconds_per_step
            speed = f", {self.config.training.batch_size / pace:.3g} images/s" if pace else ""
            left = f", {duration(pace * (total - self.step))} left" if pace and self.step < total else ""
            self._say(f"step {self.step:,} of {total:,}: {facts}{speed}{left}")
        elif not self._lines:
            self._last_line = time.perf_counter()

    def _say(self, text: str) -> None:
        say(text)
        self._last_line = time.perf_counter()

    def _give_outlook(self) -> None:
        """Say how long all will take, before it is spent, where that is long."""
        pace, total = self.seconds_per_step, self.config.training.steps
        steps, what = (total - self.step, "more steps") if self._first_step else (total, "steps")
        if pace * steps >= LONG_SECONDS:
            shorter = shorter_run(self.config, pace)
            self._say(f"{steps:,} {what}: about {duration(pace * steps)} here ({pace:.2g} s per step){shorter}")


def shorter_run(config: Config, seconds_per_step: float) -> str:
    """Name a much shorter run in half a sentence, with its time at this run's FLOPs per second; "" if there is none.

    A plan has the time that it was made for.
    """
    short = PRESETS[SHORTER]
    seconds = seconds_per_step * _flop_per_step(short) / _flop_per_step(config) * short.training.steps
    if config.preset == AUTO.preset or seconds > seconds_per_step * config.training.steps / 5:
        return ""
    return f"; --preset {SHORTER} takes about {duration(seconds)}"


def _flop_per_step(config: Config) -> float:
    with torch.device("meta"):
        return 3.0 * UNet(config.unet).estimate_flop() * config.training.batch_size
