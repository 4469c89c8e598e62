"""How far a long evaluation has come: a live bar in a terminal, one line at the end elsewhere."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ItemT = TypeVar("ItemT")


def track(items: Iterable[ItemT], total: int, doing: str) -> Iterator[ItemT]:
    """Hand on `items` and show how many of `total` are done, on the error stream."""
    console = Console(stderr=True, highlight=False)
    start = time.monotonic()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=doing)
    else:
        yield from items
    console.print(f"{doing}: {time.monotonic() - start:.1f} s", markup=False)


def say(text: str) -> None:
    """A line on the error stream."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
