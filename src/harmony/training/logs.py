"""Where the numbers of logged steps go: log.jsonl always, TensorBoard and Weights & Biases when asked for.

One flat object a logged step. Numbers are those of the step itself, not means since the last line, so that a resumed
run writes the same lines; only throughput, waiting and memory are measured over the steps since the last line. Losses
and signs are means over ranks. Keys:

    step, epoch, examples                how far the run is once the step is done
    loss, loss/NAME, weight/NAME         the weighted sum; each loss, unweighted; the factor it had in the sum
    lr, weight_decay, teacher_momentum   the values of their schedules
    grad_norm, grad_norm/PART            before clipping, over everything and a part (image, text, an objective)
    temperature                          1 over the learned factor of the similarities, where an objective has one
    loss_scale                           in fp16 only
    skipped_steps                        updates left out so far
    examples_per_second, data_wait       pairs a second over all ranks; share of the time spent waiting for data
    memory_gib                           peak memory: of the GPU, or of the process on a CPU
    sign/NAME                            signs of collapse, see harmony.training.diagnostics

A number that is not finite is written as null, since JSON has no other word for it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from harmony.disk import whole
from harmony.errors import UserError

Values = Mapping[str, float]

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Log(Protocol):
    """Something that takes the values of logged steps."""

    def write(self, values: Values) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends one JSON object a line, each on disk before `write` returns to the loop."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({key: _plain(value) for key, value in values.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLog:
    """Scalars for TensorBoard, in the run's directory."""

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, values: Values) -> None:
        for key, value in values.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(values["step"]))

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """A Weights & Biases run named as the directory; a resumed run goes on with it."""

    def __init__(self, directory: Path, recipe: Mapping[str, Any]) -> None:
        import wandb

        name = directory.resolve().name
        self._run = wandb.init(project="harmony", name=name, id=name, resume="allow", dir=str(directory), config=recipe)

    def write(self, values: Values) -> None:
        self._run.log(dict(values), step=int(values["step"]))

    def close(self) -> None:
        self._run.finish()


def check_installed(loggers: Sequence[str]) -> None:
    """Raise UserError when a logger that the recipe asks for is not installed."""
    for name in loggers:
        if find_spec(_PACKAGES[name]) is None:
            raise UserError(
                f"train.loggers asks for {name}, which is not installed; "
                f"run `pip install 'harmony[{name}]'` or leave it out of train.loggers"
            )


def open_logs(directory: Path, loggers: Sequence[str], recipe: Mapping[str, Any], step: int) -> list[Log]:
    """log.jsonl in `directory` and whatever else is asked for; `step` steps of the run are done."""
    logs: list[Log] = [JsonLines(directory / "log.jsonl")]
    if "tensorboard" in loggers:
        logs.append(TensorBoardLog(directory, step))
    if "wandb" in loggers:
        logs.append(WandbLog(directory, recipe))
    return logs


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a line that was cut off, since a resumed run writes them again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    with whole(path) as aside:
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
