"""The tasks by name, and running them."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from harmony.data.sources import Source, open_source
from harmony.errors import UserError, unknown
from harmony.evaluation import retrieval, zero_shot
from harmony.evaluation.encoder import load_encoder
from harmony.evaluation.features import Features
from harmony.evaluation.results import Metrics, write_details, write_metrics
from harmony.evaluation.settings import EvaluationConfig
from harmony.recipe import Recipe
from harmony.validation import validated

_TASKS: dict[str, ModuleType] = {"retrieval": retrieval, "zero_shot": zero_shot}
"""A task is a module with `missing(features)`, why it cannot be done (or None), and `run(features) -> Outcome`."""


def tasks() -> list[str]:
    """The names of all tasks."""
    return sorted(_TASKS)


def run(
    where: str,
    task: str,
    data_uri: str,
    model: str = "teacher",
    settings: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
) -> dict[str, float]:
    """Measure one task.

    Args:
        where: a run directory or a checkpoint directory.
        task: one of `tasks()`.
        data_uri: the data to measure on.
        model: "teacher" or "student".
        settings: of the task (`templates`) or of all (`batch_size`, `workers`, `max_examples`), by name.
        out: folder whose metrics.json gets the numbers; nothing is written without.

    Returns:
        The metrics by name; shares are fractions between 0 and 1.

    Raises:
        UserError: the task, a setting or the model is unknown, the data does not fit the task, or `out` is a file.
    """
    _module(task)
    config = config_for(task, settings or {})
    if out is not None:
        _check_folder(Path(out))
    source = open_source(data_uri)
    encoder = load_encoder(where, model)
    return _measure(task, Features(encoder, source, config), None if out is None else Path(out))


def evaluate_run(run_dir: Path | str, recipe: Recipe) -> Metrics:
    """Measure the newest checkpoint of a run on `data.val`, by the recipe's `evaluation`.

    With `tasks: auto`, the tasks that the data and the towers can answer. The numbers go into the run's metrics.json.

    Raises:
        UserError: the recipe names tasks but no data to evaluate on, or a task it names cannot be done.
    """
    config = recipe.evaluation
    if recipe.data.val is None:
        if config.tasks in ("auto", ()):
            return {}
        raise UserError(
            f"evaluation.tasks asks for {', '.join(config.tasks)}, but data.val is not given; name the data"
        )
    features = Features(
        load_encoder(str(run_dir), config.model), open_validation(recipe), config, recipe.data.max_pixels
    )
    if config.tasks == "auto":
        wanted = [task for task in tasks() if _TASKS[task].missing(features) is None]
    else:
        wanted = list(config.tasks)
    return {task: _measure(task, features, Path(run_dir)) for task in wanted}


def open_validation(recipe: Recipe) -> Source:
    """The recipe's `data.val`."""
    assert recipe.data.val is not None
    return open_source(recipe.data.val, recipe.data.options)


def _measure(task: str, features: Features, out: Path | None) -> dict[str, float]:
    module = _module(task)
    reason = module.missing(features)
    if reason:
        raise UserError(reason)
    outcome = module.run(features)
    if out is not None:
        about = {"model": features.encoder.name, "data": features.source.uri}
        write_details(out, task, about | outcome.details)
        write_metrics(out, task, outcome.metrics)
    metrics: dict[str, float] = outcome.metrics
    return metrics


def _check_folder(out: Path) -> None:
    """Raise UserError when results could not be put into `out`: before the evaluation, not after it."""
    for path in (out, *out.parents):
        if path.exists():
            if not path.is_dir():
                raise UserError(f"{path} is a file; choose another --out")
            return


def _module(task: str) -> ModuleType:
    if task not in _TASKS:
        raise unknown("task", task, _TASKS)
    return _TASKS[task]


def config_for(task: str, settings: Mapping[str, Any]) -> EvaluationConfig:
    """The settings for one task from `--set key=value`, where the task's own keys need not be written `task.key`.

    Raises:
        UserError: a key or a value is wrong.
    """
    own = type(getattr(EvaluationConfig(), task))
    assert issubclass(own, BaseModel)
    of_all = [key for key in EvaluationConfig.model_fields if key not in ("tasks", "model", *_TASKS)]
    values: dict[str, Any] = {task: {}}
    for key, value in settings.items():
        name = key.removeprefix(f"{task}.")
        if name in own.model_fields:
            values[task][name] = value
        elif key in of_all:
            values[key] = value
        else:
            raise unknown(f"setting of {task}", key, [*own.model_fields, *of_all])
    return validated(EvaluationConfig, values)
