"""How a run is asked to stop: SIGINT and SIGTERM wait until the step is done."""

import signal
import threading
from types import FrameType


class InterruptedRunError(Exception):
    """The run was asked to stop by a signal; it has been saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.exit_status = 128 + number


class Signals:
    """Remembers SIGINT and SIGTERM until the step is done; restores the handlers on leaving.

    Only the main thread may set handlers: elsewhere nothing is remembered.
    """

    def __enter__(self) -> "Signals":
        self.received = 0
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
