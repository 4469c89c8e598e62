"""What a run tells while it trains: the log, the progress line, the examples that could not be read."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.loader import PairLoader
from harmony.errors import UserError
from harmony.recipe import Recipe
from harmony.schedules import Clock
from harmony.training import distributed
from harmony.training.diagnostics import memory_gib
from harmony.training.logs import Log, open_logs
from harmony.training.measured import Measured
from harmony.training.progress import ProgressLine
from harmony.training.run_directory import RunDirectory


class Journal:
    """Writes on the first rank; on the others it only takes part in what ranks exchange."""

    def __init__(self, run: RunDirectory, recipe: Recipe, clock: Clock, device: torch.device) -> None:
        """`clock`: the place in the run at which it starts or goes on."""
        self._run = run
        self._batch_size = recipe.data.batch_size
        self._device = device
        self._logs: list[Log] = []
        if ranks.is_main():
            self._logs = open_logs(run.path, recipe.train.loggers, recipe.to_dict(), clock.step)
        self._progress = ProgressLine(clock, self._batch_size, shown=ranks.is_main())
        self._bad: list[dict[str, object]] = []
        self._waited = 0.0
        self._since = (clock.step, time.monotonic())

    def __enter__(self) -> "Journal":
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.__exit__(kind, error, at)
        for log in self._logs:
            log.close()

    def say(self, text: str) -> None:
        """A line to the user."""
        self._progress.say(text)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in this block counts as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def note(self, step: int, loaded: Sequence[Batch]) -> None:
        """Remember the bad examples that were met while the batches of a step were put together."""
        for batch in loaded:
            self._bad += [{"step": step, "key": key, "reason": reason} for key, reason in batch.skipped]

    def step(self, clock: Clock, measured: Measured) -> None:
        """A step is done; `clock` is the place after it."""
        self._progress.update(clock, measured.loss, self._share_waited())

    def log(self, clock: Clock, measured: Measured, signs: Mapping[str, Tensor], skipped: int) -> None:
        """Write the step that was just done to the log. All ranks must call this."""
        values: dict[str, float] = {
            "step": clock.step,
            "epoch": clock.epoch,
            "examples": clock.step * self._batch_size,
            "loss": measured.loss,
        }
        for name, loss in measured.losses.items():
            values |= {f"loss/{name}": loss, f"weight/{name}": measured.weights[name]}
        values |= measured.rates
        values["grad_norm"] = measured.norm
        values |= {f"grad_norm/{part}": norm for part, norm in measured.norms.items()}
        values |= _told(signs)
        values |= {"skipped_steps": skipped, **self._speed(clock.step), "memory_gib": memory_gib(self._device)}
        for log in self._logs:
            log.write(values)
        self.note_bad_examples()

    @contextmanager
    def keeping_bad_examples(self, loader: PairLoader, step: int) -> Iterator[None]:
        """If the data turns out too bad within this block, the list of what was bad is written before the run ends."""
        try:
            yield
        except UserError:
            self._bad += [{"step": step, "key": key, "reason": reason} for key, reason in loader.refused]
            self._append(self._bad)  # by each rank for itself: the others may not be coming
            raise

    def note_bad_examples(self) -> None:
        """Append the bad examples that any rank met since the last call to their file. All ranks must call this."""
        found = [record for records in distributed.everyones(self._bad) for record in records]
        self._bad = []
        if ranks.is_main():
            self._append(found)

    def _append(self, records: Sequence[dict[str, object]]) -> None:
        if records:
            with self._run.bad_examples.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def _speed(self, step: int) -> dict[str, float]:
        """Throughput and waiting since the last call."""
        before, since = self._since
        now = time.monotonic()
        speed = {
            "examples_per_second": (step - before) * self._batch_size / max(now - since, 1e-9),
            "data_wait": self._share_waited(),
        }
        self._since, self._waited = (step, now), 0.0
        return speed

    def _share_waited(self) -> float:
        return self._waited / max(time.monotonic() - self._since[1], 1e-9)


def _told(signs: Mapping[str, Tensor]) -> dict[str, float]:
    """Signs as numbers, averaged over ranks; a learned temperature stands by itself as well."""
    if not signs:
        return {}
    values = ranks.mean(torch.stack([value.float() for value in signs.values()])).tolist()
    named = dict(zip(signs, values, strict=True))
    temperatures = [value for name, value in named.items() if name.endswith("/temperature")]
    learned = {"temperature": temperatures[0]} if temperatures else {}
    return learned | {f"sign/{name}": value for name, value in named.items()}
