"""SIGTERM and Ctrl-C: a run finishes its step, saves, and leaves."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupted(SystemExit):
    """A run that stopped for a signal after saving; leaves with exit status 128 + signal (143, 130).

    Attributes:
        message: what happened and how to go on, for whoever reports it.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message


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

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
