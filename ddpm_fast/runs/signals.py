"""How work is asked to stop: SIGINT and SIGTERM end it at once, but for what must not be left half done.

The second signal ends that, too. Files appear whole or not at all in any case (see `files`). SIGUSR1 ends nothing: it
asks a run that trains to save and draw now, and elsewhere does nothing.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)
ASKS = getattr(signal, "SIGUSR1", None)
"""What Windows has not."""


class InterruptedRunError(KeyboardInterrupt):
    """A signal ended the work. A KeyboardInterrupt, so that no `except Exception` on its way stops it."""

    def __init__(self, number: int, message: str = "interrupted; nothing was written") -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.number, self.exit_status = number, 128 + number


class Signals:
    """Turns SIGINT and SIGTERM into InterruptedRunError, where and when they arrive; restores the handlers on leaving.

    Between two lines of Python, that is: PyTorch finishes what it computes. Only the main thread may set handlers:
    elsewhere nothing is done.
    """

    def __init__(self) -> None:
        self._received, self._pending, self._held, self._asked = 0, 0, 0, False

    def __enter__(self) -> "Signals":
        main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._arrived) for number in NUMBERS if main}
        if main and ASKS is not None:
            self._before[ASKS] = signal.signal(ASKS, self._note)
            around = getattr(self._before[ASKS], "__self__", None)
            if isinstance(around, Signals):
                self._asked |= around.asked()  # before this block: what was asked is not forgotten
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        again, self._received = self._received, number
        if self._held and not again:
            self._pending = number
            return
        if again:  # and a third one ends the process
            for each in NUMBERS:
                signal.signal(each, signal.SIG_DFL)
        raise InterruptedRunError(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Return whether SIGUSR1 arrived since this was called last."""
        asked, self._asked = self._asked, False
        return asked

    @property
    def asked_before(self) -> bool:
        """Return whether SIGUSR1 has arrived and nobody has called `asked` since."""
        return self._asked

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let what must not be left half done be finished: a first signal in the block is obeyed at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._pending and not self._held:
            number, self._pending = self._pending, 0
            raise InterruptedRunError(number)
