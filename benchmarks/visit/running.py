"""Doing the tasks of a stage one after the other within a time, and keeping what they found whatever happens."""

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Found = dict[str, Any]
"""What a task found: plain values. `details` is for the file alone; `ok: False` says that something is wrong."""


@dataclass(frozen=True)
class Task:
    """One measurement or check.

    Attributes:
        name: what reports call it.
        run: does it.
        seconds: about how long it takes; it is not begun when less is left.
    """

    name: str
    run: Callable[[], Found]
    seconds: float


Stage = Generator[Task, Found | None, None]
"""Yields tasks, and is sent what each found: None for one that was left out, `failed` in it when it broke off."""


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        device: what is measured.
        tiny: smallest sizes and few steps, to see on any machine that everything runs.
        out: folder for what is to be taken away.
        keep: folder for what is large and may stay: shards that were made, runs.
        golden: folder with recorded steps, beside those of the tests.
        data: folder with data sets, in the layout of docs/gpu-visit.md.
        workers: processes that load.
        options: words of the command line for the stage.
        budget: the time.
    """

    device: torch.device
    tiny: bool
    out: Path
    keep: Path
    golden: Path
    data: Path
    workers: int
    options: tuple[str, ...]
    budget: "Budget"


class OutOfTimeError(Exception):
    """A task was still running when the time was over."""


class Budget:
    """The time that a stage may take.

    Attributes:
        seconds: when nothing new is begun.
        grace: how much later what runs is broken off.
    """

    def __init__(self, seconds: float, grace: float = 30.0) -> None:
        self.seconds, self.grace = seconds, grace
        self._begun = time.monotonic()

    def left(self) -> float:
        """Seconds until nothing new is begun."""
        return self.seconds - self.spent()

    def spent(self) -> float:
        return time.monotonic() - self._begun

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise OutOfTimeError within the block once time and grace are over; only a main thread can be told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def over(*_: Any) -> None:
            raise OutOfTimeError(f"broken off after {self.spent():.0f} s")

        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self.left() + self.grace))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def carry_out(name: str, stage: Stage, setting: Setting, about: Found) -> Found:
    """Do a stage's tasks, and write `OUT/NAME.json` after each.

    Args:
        name: of the stage.
        stage: its tasks.
        setting: where and how large.
        about: what the report begins with.

    Returns:
        The report: `done` by task, `left_out` for want of time, `failed` and `wrong` names of tasks, `seconds`.
    """
    report: Found = {"stage": name, **about, "done": {}, "left_out": [], "failed": [], "wrong": []}
    found: Found | None = None
    while True:
        try:
            task = stage.send(found)
        except StopIteration:
            break
        except Exception as error:  # a stage that cannot say what is next has still found what it found
            report["failed"].append(f"{name} itself: {_told(error)}")
            break
        if setting.budget.left() < task.seconds:
            report["left_out"].append(task.name)
            found = None
        else:
            found = report["done"][task.name] = _attempted(task, setting)
            for kind, seen in (("failed", "failed" in found), ("wrong", found.get("ok") is False)):
                report[kind] += [task.name] if seen else []
        report["seconds"] = setting.budget.spent()
        write(setting.out / f"{name}.json", report)
    return report


def _attempted(task: Task, setting: Setting) -> Found:
    begun = time.monotonic()
    sys.stderr.write(f"{setting.budget.spent():6.0f} s  {task.name}\n")
    try:
        with setting.budget.enforced():
            found = task.run()
    except torch.OutOfMemoryError as error:
        found = {"failed": "out of memory", "details": str(error)}
    except Exception as error:
        found = {"failed": _told(error), "details": traceback.format_exc()}
    gc.collect()  # parts of a learner hold each other
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return {**found, "seconds": time.monotonic() - begun}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def write(path: Path, report: Found) -> None:
    """Replace a report as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(report, indent=1) + os.linesep, encoding="utf-8")
    aside.replace(path)


def brief(value: Any) -> Any:
    """A report for the screen: without details, numbers to four digits."""
    if isinstance(value, dict):
        return {key: brief(inner) for key, inner in value.items() if key != "details"}
    if isinstance(value, list):
        return [brief(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
