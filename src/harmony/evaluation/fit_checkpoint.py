"""From where an interrupted training of a task goes on: `fit.pt` in the task's folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmony import ranks
from harmony.disk import whole
from harmony.errors import UserError
from harmony.evaluation.progress import say
from harmony.training import checkpoints
from harmony.training.distributed import everyones, together

_NAME = "fit.pt"


class FitCheckpoint:
    """One training's checkpoint, all or nothing on disk.

    Args:
        work: folder it lies in; None keeps none.
        about: what must be equal for it to be gone on with, as JSON has it.
        modules: everything trained or averaged, by name.
        optimiser: whose state is kept, too.
    """

    def __init__(
        self,
        work: Path | None,
        about: Mapping[str, Any],
        modules: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
    ) -> None:
        self.path = None if work is None else work / _NAME
        self._about: dict[str, Any] = json.loads(json.dumps(about, default=str))
        self._modules = modules
        self._optimiser = optimiser

    def check_room(self) -> None:
        """Raise UserError when the disk has no room for it: before training, not after."""
        if self.path is None:
            return
        trained = sum(p.nbytes for group in self._optimiser.param_groups for p in group["params"])
        with together():
            if ranks.is_main():
                checkpoints.check_room(self.path.parent, self._weights(), trained)

    def restore(self) -> tuple[int, Any]:
        """Load it where there is one that fits; (0, None) where there is not.

        Returns:
            Steps done, and what `save` was given besides.

        Raises:
            UserError: some process sees it and another does not.
        """
        state = self._read()
        step = 0 if state is None else int(state["step"])
        if len(set(everyones(step))) > 1:
            raise UserError(f"not every process can read {self.path}; put --out on a disk that all of them share")
        if state is None:
            return 0, None
        for name, module in self._modules.items():
            module.load_state_dict(state["modules"][name])
        self._optimiser.load_state_dict(state["optimiser"])
        if ranks.is_main():
            say(f"Going on from step {step:,}")
        return step, state["besides"]

    def save(self, step: int, besides: Any) -> None:
        """Write it, in place of an earlier one.

        Args:
            step: steps done.
            besides: numbers and plain containers.
        """
        if self.path is None:
            return
        with together():
            if ranks.is_main():
                self._write(self.path, step, besides)

    def _write(self, path: Path, step: int, besides: Any) -> None:
        state = {
            "step": step,
            "about": self._about,
            "modules": {name: module.state_dict() for name, module in self._modules.items()},
            "optimiser": self._optimiser.state_dict(),
            "besides": besides,
        }
        # Given a path, torch hides the system's error; a file's own error stands in the chain of causes.
        with whole(path) as aside, aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> dict[str, Any] | None:
        """What the file holds; None when there is none, it is damaged, or it is of another training."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            about = state["about"]
            different = sorted(key for key in about | self._about if about.get(key) != self._about.get(key))
        except Exception:  # whatever torch makes of a damaged file
            self._begin_anew("cannot be read")
            return None
        if different:
            self._begin_anew(f"belongs to a training with other {', '.join(different)}")
            return None
        return state

    def _begin_anew(self, reason: str) -> None:
        if ranks.is_main():
            say(f"{self.path} {reason}; the training begins anew")

    def _weights(self) -> dict[str, torch.Tensor]:
        return {f"{n}.{key}": value for n, m in self._modules.items() for key, value in m.state_dict().items()}


def forget(work: Path | None) -> None:
    """Remove the checkpoint of a training whose results are written."""
    if work is not None and ranks.is_main():
        for left in (work / _NAME, *work.glob(f".{_NAME}.*")):  # those aside are of a training that was killed
            left.unlink(missing_ok=True)
