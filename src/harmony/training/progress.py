"""One line that says how far the run is and when it will be done: live in a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_PLAIN_SECONDS = 5.0
"""Least time between two plain lines."""

_NOTABLE_WAIT = 0.1
"""Share of time spent waiting for data from which on the line says so."""


class ProgressLine:
    """Shows progress on standard error; on ranks other than the first it shows nothing."""

    def __init__(self, steps: int, start: int, shown: bool = True) -> None:
        self._steps = steps
        self._shown = shown
        self._console = Console(stderr=True, highlight=False)
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._last_plain = 0.0
        self._seconds_a_step: float | None = None
        self._place = (start, time.monotonic())
        if shown and self._console.is_terminal:
            columns = (
                TextColumn("[bold cyan]harmony"),
                BarColumn(bar_width=24, complete_style="cyan"),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.description}"),
            )
            self._live = Progress(*columns, console=self._console, transient=False)
            self._task = self._live.add_task("waiting for the first step", total=steps, completed=start)

    def __enter__(self) -> "ProgressLine":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int, epoch: float, loss: float, rate: float, waiting: float) -> None:
        """Show that `step` steps are done.

        Args:
            step, epoch: how far the run is.
            loss: of the last step.
            rate: pairs a second.
            waiting: share of the time spent waiting for data, from 0 to 1.
        """
        self._time(step)
        if not self._shown:
            return
        facts = [f"step {step}/{self._steps}", f"epoch {epoch:.2f}", f"loss {loss:.4g}", f"{rate:.4g} pairs/s"]
        if waiting >= _NOTABLE_WAIT:
            facts.append(f"{waiting:.0%} waiting for data")
        if self._seconds_a_step is not None:
            facts.append(f"{spoken((self._steps - step) * self._seconds_a_step)} left")
        if self._live:
            self._live.update(self._task, completed=step, description="[dim] · [/dim]".join(facts))
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS or step == self._steps:
            self._last_plain = time.monotonic()
            sys.stderr.write(" · ".join(facts) + "\n")
            sys.stderr.flush()

    def say(self, text: str) -> None:
        """Print a line of its own, above the live line."""
        if self._shown:
            self._console.print(text, markup=False, soft_wrap=True)

    def _time(self, step: int) -> None:
        """Keep a running mean of the seconds a step takes; the first steps, which warm up, soon lose their weight."""
        before, since = self._place
        if step <= before:
            return
        seconds = (time.monotonic() - since) / (step - before)
        self._place = (step, time.monotonic())
        old = self._seconds_a_step
        self._seconds_a_step = seconds if old is None else 0.9 * old + 0.1 * seconds


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
