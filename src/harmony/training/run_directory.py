"""A run's directory: what lies where, and that one process at a time writes to it.

OUT/
    recipe.yaml           the resolved recipe
    log.jsonl             one object a logged step (harmony.training.logs)
    bad_examples.jsonl    examples that could not be read: step, key, reason
    not_finite/           batches whose loss or gradient was not finite
    checkpoints/          harmony.training.checkpoints
    metrics.json, report.html   written by evaluation
    .lock                 while a process writes here
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harmony import recipe as recipes
from harmony.errors import UserError
from harmony.recipe import Recipe
from harmony.training import checkpoints

_HELD: set[Path] = set()
"""Locks of this process; the system's locks tell only processes apart."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def bad_examples(self) -> Path:
        return self.path / "bad_examples.jsonl"

    @property
    def not_finite(self) -> Path:
        return self.path / "not_finite"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def recipe(self) -> Recipe:
        """The recipe of the run, as it stands in recipe.yaml now."""
        return recipes.load(self.recipe_file)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None before the first."""
        found = checkpoints.every(self.checkpoints)
        return found[-1] if found else None


def open_run(out: Path | str) -> RunDirectory:
    """The directory of a run that was started before.

    Raises:
        UserError: there is no run there.
    """
    run = RunDirectory(Path(out))
    if not run.path.is_dir():
        raise UserError(f"there is no directory {str(out)!r}; name the directory that `harmony train --out` was given")
    if not run.recipe_file.is_file():
        raise UserError(f"{out} holds no run (it has no recipe.yaml); name the directory that `harmony train` wrote")
    return run


@contextmanager
def new_run(out: Path | str, recipe: Recipe) -> Iterator[RunDirectory]:
    """Make the directory of a new run and hold its lock; call it once nothing else can be wrong with the input.

    Raises:
        UserError: the directory holds a run, is in use, or cannot be made.
    """
    run = RunDirectory(Path(out))
    check_free(run.path)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run.path} cannot be made ({error.strerror}); choose another --out") from error
    with locked(run):
        check_free(run.path)
        recipe.save(run.recipe_file)
        yield run


def check_free(out: Path | str) -> None:
    """Raise UserError when a new run cannot be written to `out`."""
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose another --out")
    if any((path / name).exists() for name in ("recipe.yaml", "log.jsonl", "checkpoints")):
        raise UserError(
            f"{path} already holds a run; choose another --out, or go on with it by `harmony resume {path}`"
        )


@contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """Keep other processes from writing to the run. The system lets go of the lock when this process ends, however.

    The lock belongs to this process alone (POSIX record lock): the loader's workers do not keep it alive after a crash.

    Raises:
        UserError: another process holds it, or this directory cannot be written to.
    """
    path = (run.path / ".lock").resolve()
    descriptor = _take(path, run.path)
    _HELD.add(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _HELD.discard(path)
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path, out: Path) -> int:
    """The descriptor of the lock file, locked."""
    if path in _HELD:
        raise UserError(f"{out} is in use by this process; wait until it is done or choose another directory")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{out} cannot be written to ({error.strerror}); choose another directory") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(f"{out} is in use by {holder}; wait until it is done or choose another directory") from None
        # Whoever held it before may have removed the file after we opened it; then we locked a file without a name.
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
        os.close(descriptor)
