"""SIGTERM and Ctrl-C: a run finishes its step, saves, and leaves."""

import signal
from types import FrameType, TracebackType
from typing import Any

from harmony.training.distributed import agree


class Interrupted(SystemExit):
    """A run stopped for a signal, after saving. The exit status is 143 for SIGTERM, 130 for Ctrl-C (128 + signal)."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Signals:
    """Within `with Signals() as signals:`, a first SIGTERM or SIGINT is only noted in `signals.received`.

    A second Ctrl-C leaves at once, through KeyboardInterrupt. Only a main thread can receive signals; in any other this
    does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def anywhere(self) -> int | None:
        """The signal that any rank has received. All ranks must call this."""
        terminate, interrupt = agree([self.received == signal.SIGTERM, self.received == signal.SIGINT])
        return signal.SIGTERM if terminate else signal.SIGINT if interrupt else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
