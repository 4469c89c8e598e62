"""One line that says how far the run is and when it will be done: live in a terminal, a line now and then elsewhere."""

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from harmony.schedules import Clock

_PLAIN_SECONDS = 5.0
"""Least time between two plain lines."""

_NOTABLE_WAIT = 0.1
"""Share of time spent waiting for data from which on the line says so."""


class ProgressLine:
    """Shows progress on standard error; on ranks other than the first it shows nothing."""

    def __init__(self, clock: Clock, batch_size: int, shown: bool = True) -> None:
        """`clock`: the place in the run at which it starts. `batch_size`: pairs a step."""
        self._batch_size = batch_size
        self._shown = shown
        self._console = Console(stderr=True, highlight=False)
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._last_plain = -math.inf
        self._seconds_a_step: float | None = None
        self._last = time.monotonic()
        if shown and self._console.is_terminal:
            # Only the description gives way in a narrow terminal.
            columns = (
                TextColumn("[bold cyan]harmony", table_column=Column(min_width=7)),
                BarColumn(16, complete_style="cyan", finished_style="green", table_column=Column(min_width=16)),
                TextColumn("{task.percentage:>3.0f}%", table_column=Column(min_width=4)),
                TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            )
            self._live = Progress(*columns, console=self._console, expand=True)
            self._task = self._live.add_task("waiting for the first step", total=clock.steps, completed=clock.step)

    def __enter__(self) -> "ProgressLine":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, clock: Clock, loss: float, waiting: float) -> None:
        """Show that a step is done.

        Args:
            clock: the place in the run after it.
            loss: of the step.
            waiting: share of the time spent waiting for data, from 0 to 1.
        """
        if not self._shown:
            return
        seconds = self._timed()
        rate = self._batch_size / seconds
        left = spoken((clock.steps - clock.step) * seconds)
        facts = [  # the most wanted first, for narrow terminals
            f"step {clock.step}/{clock.steps}",
            f"loss {loss:.4f}",
            f"{left} left" if clock.step < clock.steps else "done",
            f"{rate:.1f} pairs/s" if rate < 10 else f"{rate:.0f} pairs/s",
            f"epoch {clock.epoch:.2f}",
        ]
        if waiting >= _NOTABLE_WAIT:
            facts.append(f"{waiting:.0%} waiting for data")
        if self._live:
            self._live.update(self._task, completed=clock.step, description="[dim] · [/dim]".join(facts))
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS or clock.step == clock.steps:
            self._last_plain = time.monotonic()
            sys.stderr.write(" · ".join(facts) + "\n")
            sys.stderr.flush()

    def say(self, text: str) -> None:
        """Print a line of its own, above the live line."""
        if self._shown:
            self._console.print(text, markup=False, soft_wrap=True)

    def _timed(self) -> float:
        """Seconds a step takes, as a running mean in which the first steps, which warm up, soon lose their weight."""
        now = time.monotonic()
        took, self._last = max(now - self._last, 1e-9), now
        old = self._seconds_a_step
        self._seconds_a_step = took if old is None else 0.9 * old + 0.1 * took
        return self._seconds_a_step


def spoken(seconds: float) -> str:
    """A duration as people say it: 45 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
