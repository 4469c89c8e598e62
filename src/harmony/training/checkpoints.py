"""Checkpoints: directories that are complete or not there at all.

A checkpoint is written into a directory aside, brought safely to disk, and renamed:

    checkpoints/step-00001200/
        model.safetensors   the learner's state dict: student.*, teacher.*, objectives.NAME.*
        training.pt         optimiser and loss scaler, for torch.load(..., weights_only=True)
        state.json          the place in the run and what it was run with, see `State`
        recipe.yaml         the resolved recipe

Random streams need no saving: they are functions of the seed, the step and the example (harmony.chance).
"""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from harmony.disk import is_full
from harmony.errors import UserError

FORMAT = 1
"""Version of the layout above; raised when an older harmony could not go on from it."""

_ASIDE = ".aside-"
_MEBIBYTE = 2**20


@dataclass
class State:
    """What state.json holds.

    Attributes:
        step: optimiser steps done.
        steps, epoch_steps: steps of the whole run and of an epoch.
        examples: examples seen by those steps.
        skipped: updates left out because something was not finite.
        data: URI, number of examples and fingerprint of the training data.
        ranks: number of processes.
        harmony, torch, timm, open_clip: versions.
        recipe: fingerprint of the settings that may change results.
        format: `FORMAT` at the time of writing.
    """

    step: int
    steps: int
    epoch_steps: int
    examples: int
    skipped: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    harmony: str = field(default_factory=lambda: version_of("harmony"))
    torch: str = str(torch.__version__)
    timm: str = field(default_factory=lambda: version_of("timm"))
    open_clip: str = field(default_factory=lambda: version_of("open_clip_torch"))
    recipe: str = ""
    format: int = FORMAT

    @property
    def epoch(self) -> float:
        return self.step / self.epoch_steps


def save(
    directory: Path, model: Mapping[str, Tensor], training: Mapping[str, Any], state: State, recipe: str, keep: int
) -> Path:
    """Write the checkpoint of `state.step` into `directory`, unless it is there, and remove all but the last `keep`.

    Args:
        directory: the run's `checkpoints` directory; made if missing.
        model: the learner's state dict.
        training: tensors and plain containers.
        state: the place in the run.
        recipe: the recipe as YAML text.
        keep: checkpoints to leave, this one included.

    Raises:
        UserError: there is no room on the disk. Earlier checkpoints are as they were.
    """
    aside, final = directory / f"{_ASIDE}{state.step:08}-{os.getpid()}", directory / f"step-{state.step:08}"
    if final in every(directory):
        return final
    needed = _bytes(model) + _bytes(training) + _MEBIBYTE
    try:
        directory.mkdir(exist_ok=True)
        sweep(directory)
        if _free(directory) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        aside.mkdir()
        _write(aside / "model.safetensors", lambda path: safetensors.torch.save_file(_contiguous(model), path))
        _write(aside / "training.pt", lambda path: _save_tensors(training, path))
        _write(aside / "state.json", lambda path: path.write_text(json.dumps(asdict(state), indent=1) + "\n"))
        _write(aside / "recipe.yaml", lambda path: path.write_text(recipe, encoding="utf-8"))
        # safetensors lets nobody else read its file; whoever may read the others may read it, too.
        (aside / "model.safetensors").chmod((aside / "state.json").stat().st_mode)
        _sync(aside)
        aside.rename(final)
        _sync(directory)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if is_full(error):
            raise _no_room(directory, needed) from error
        raise
    for old in every(directory)[:-keep]:
        half_gone = old.rename(directory / f"{_ASIDE}{old.name}")  # so that no half of it is taken for a checkpoint
        shutil.rmtree(half_gone)
    return final


def check_room(out: Path, model: Mapping[str, Tensor], trained: int) -> None:
    """Raise UserError when the disk of a run that is yet to begin has no room for one checkpoint.

    Args:
        out: the run's directory, which may not exist.
        model: the learner's state dict.
        trained: bytes of the trained parameters, of which AdamW keeps two means.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    needed, free = _bytes(model) + 2 * trained + _MEBIBYTE, shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"a checkpoint of this run takes {_size(needed)}, and the disk of {out} has {_size(free)} free; make room "
            "or choose another --out"
        )


@contextmanager
def full_disk_explained(directory: Path) -> Iterator[None]:
    """Turn a write that failed for want of room, in the run that `directory` belongs to, into a UserError."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise UserError(
                f"no room on the disk of {directory.parent}, which has {_size(_free(directory))} free; make room, then "
                f"go on with `harmony resume {directory.parent}`"
            ) from error
        raise


def _no_room(directory: Path, needed: int) -> UserError:
    return UserError(
        f"no room to save a checkpoint in {directory}: it takes {_size(needed)}, and {_size(_free(directory))} are "
        f"free; make room, then go on with `harmony resume {directory.parent}`"
    )


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory if directory.exists() else directory.parent).free


def every(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / "state.json").is_file())


def sweep(directory: Path) -> None:
    """Remove what a process that was killed left half-written."""
    for path in directory.glob(f"{_ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: Path) -> State:
    """The state of a checkpoint.

    Raises:
        UserError: it cannot be read, or another version of harmony wrote it in a format unknown here.
    """
    try:
        values = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(
                f"{checkpoint} was written by harmony {values.get('harmony')} in checkpoint format {values['format']}, "
                f"but this version reads format {FORMAT}; go on with the version that wrote it"
            )
        return State(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(checkpoint / "state.json", error) from error


def read_model(checkpoint: Path) -> dict[str, Tensor]:
    """The learner's state dict, on the CPU."""
    path = checkpoint / "model.safetensors"
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise _broken(path, error) from error


def shapes_of_model(checkpoint: Path) -> dict[str, list[int]]:
    """The shapes of the learner's state dict by name, from the file's header alone."""
    path = checkpoint / "model.safetensors"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise _broken(path, error) from error


def read_training(checkpoint: Path) -> dict[str, Any]:
    """The state of the optimiser and the loss scaler, on the CPU."""
    path = checkpoint / "training.pt"
    try:
        values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return values
    except OSError as error:
        raise _broken(path, error) from error
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        # PyTorch's own text is long, and recommends what would run whatever code the file holds.
        raise _broken(path, ValueError("it is damaged, or holds more than tensors")) from error


def _broken(path: Path, error: Exception) -> UserError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"{path} cannot be read ({first}); remove the directory {path.parent} to go on from the checkpoint before it"
    )


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources without having been installed
        return "unknown"


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file and bring it to disk."""
    write(path)
    _sync(path)


def _save_tensors(values: Mapping[str, Any], path: Path) -> None:
    # Given a path, torch hides the system's error; a file's own error stands in the chain of causes.
    with path.open("wb") as file:
        torch.save(dict(values), file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _bytes(value: Any) -> int:
    """Bytes of all tensors in a nest of containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(_bytes(item) for item in value.values())
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / _MEBIBYTE:.1f} MiB"
