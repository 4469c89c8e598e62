"""How far a long evaluation has come: a live bar in a terminal, one line at the end elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harmony import ranks

ItemT = TypeVar("ItemT")

BAD_SHOWN = 3
"""Bad examples that are named."""


def track(items: Iterable[ItemT], total: int, doing: str) -> Iterator[ItemT]:
    """Hand on `items` and show how many of `total` are done, on the error stream."""
    console = Console(stderr=True, highlight=False)
    start = time.monotonic()
    if console.is_terminal and ranks.is_main():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=doing)
    else:
        yield from items
    if ranks.is_main():
        console.print(f"{doing}: {time.monotonic() - start:.1f} s", markup=False)


def say(text: str) -> None:
    """A line on the error stream."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def say_left_out(uri: str, bad: Sequence[tuple[str, str]], what: str = "read") -> None:
    """Which examples of some data cannot be used, as (key, reason); the first few are named."""
    if bad and ranks.is_main():
        named = "; ".join(f"{key} {reason}" for key, reason in bad[:BAD_SHOWN])
        examples = "1 example" if len(bad) == 1 else f"{len(bad):,} examples"
        say(f"{examples} of {uri} cannot be {what} and {'is' if len(bad) == 1 else 'are'} left out: {named}")


@contextmanager
def steps_bar(steps: int, start: int, doing: str) -> Iterator[Callable[[int, str], None]]:
    """A live bar for a training in a terminal, one line at its end elsewhere; gives `show(steps done, text)`."""
    console = Console(stderr=True, highlight=False)
    begun, last = time.monotonic(), ""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    live = Progress(*columns, console=console, transient=True) if console.is_terminal and ranks.is_main() else None

    def show(done: int, text: str) -> None:
        nonlocal last
        last = text
        if live is not None:
            live.update(task, completed=done, description=f"{doing}, {text}")

    if live is not None:
        with live:
            task = live.add_task(doing, total=steps, completed=start)
            yield show
    else:
        yield show
    if ranks.is_main():
        console.print(f"{doing}: {steps:,} steps, {last}, {time.monotonic() - begun:.1f} s", markup=False)
