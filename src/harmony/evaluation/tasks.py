"""The tasks by name, and running them."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

from pydantic import BaseModel

from harmony import ranks
from harmony.data.sources import Source, open_source
from harmony.disk import is_full
from harmony.errors import UserError, unknown
from harmony.evaluation.encoder import Encoder
from harmony.evaluation.encoders import load_encoder
from harmony.evaluation.fitting import forget
from harmony.evaluation.progress import say
from harmony.evaluation.results import Metrics, Outcome, read_details, write_details, write_metrics
from harmony.evaluation.settings import TASKS, EvaluationConfig
from harmony.evaluation.task import Card, Setup
from harmony.recipe import Recipe
from harmony.training import distributed
from harmony.training.distributed import together
from harmony.validation import validated

AUTO = ("zero_shot", "retrieval")
"""Tasks that `tasks: auto` considers: those that train nothing."""


class Task(Protocol):
    """What the module of a task offers, see harmony.evaluation.task."""

    def missing(self, setup: Setup) -> str | None: ...

    def card(self, setup: Setup) -> Card: ...

    def run(self, setup: Setup) -> Outcome: ...


def task_named(name: str) -> Task:
    """The module of a task; UserError when there is none of that name."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return cast(Task, import_module(f"harmony.evaluation.{name}"))


def run(
    where: str,
    task: str,
    data_uri: str,
    train_uri: str | None = None,
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
) -> Outcome:
    """Measure one task; under torchrun, together with the other processes.

    Args:
        where: what is measured, see `harmony.evaluation.encoders`.
        task: one of `TASKS`.
        data_uri: the data to measure on.
        train_uri: the data to learn from, for tasks that learn.
        model: "teacher", "student" or "untrained", for a run; what its recipe names when None.
        settings: of the task (`templates`) or of all (`batch_size`, `workers`, `max_examples`), by name.
        out: folder whose metrics.json gets the numbers; nothing is written without.

    Returns:
        Metrics by name (shares are fractions between 0 and 1), details for the report, and the protocol card.

    Raises:
        UserError: the task, a setting or the model is unknown, the data does not fit the task, or `out` is a file.
    """
    task_named(task)
    config = config_for(task, settings or {})
    folder = None if out is None else Path(out)
    if folder is not None:
        _check_folder(folder)
    with distributed.session() as place, together():
        data = open_source(data_uri)
        train = None if train_uri is None else open_source(train_uri)
        encoder = load_encoder(where, model, place.device)
        if folder is not None:
            _check_one_model(folder, encoder)
        setup = Setup(encoder, data, train, config, _work(folder, task))
        _tell_problems(setup)
        return measure(task, setup, folder)


def evaluate_run(run_dir: Path | str, recipe: Recipe) -> Metrics:
    """Measure the newest checkpoint of a run on `data.val`, by the recipe's `evaluation`.

    With `tasks: auto`, zero-shot classification and retrieval where data and towers can answer them. Tasks that learn
    do so from `evaluation.train`, or else from the run's own data. The numbers go into the run's metrics.json.

    Raises:
        UserError: the recipe names tasks but no data to evaluate on, or a task it names cannot be done.
    """
    config, folder = recipe.evaluation, Path(run_dir)
    if recipe.data.val is None:
        if config.tasks in ("auto", ()):
            return {}
        raise UserError(
            f"evaluation.tasks asks for {', '.join(config.tasks)}, but data.val is not given; name the data"
        )
    data, encoder = open_validation(recipe), load_encoder(str(folder), config.model)
    train = None
    if config.tasks != "auto":
        train = open_source(config.train) if config.train else open_source(recipe.data.train, recipe.data.options)
    setup = Setup(encoder, data, train, config, max_pixels=recipe.data.max_pixels)
    _tell_problems(setup)
    if config.tasks == "auto":
        wanted = [task for task in AUTO if task_named(task).missing(setup) is None]
    else:
        wanted = list(config.tasks)
    done: Metrics = {}
    for task in wanted:
        setup.work = _work(folder, task)
        done[task] = measure(task, setup, folder).metrics
    return done


def open_validation(recipe: Recipe) -> Source:
    """The recipe's `data.val`."""
    assert recipe.data.val is not None
    return open_source(recipe.data.val, recipe.data.options)


def _work(folder: Path | None, task: str) -> Path | None:
    return None if folder is None else folder / "evaluation" / task


def measure(task: str, setup: Setup, out: Path | None) -> Outcome:
    """Measure one task, and write what it found into `out`; UserError where encoder or data do not fit it."""
    module = task_named(task)
    reason = module.missing(setup)
    if reason:
        raise UserError(reason)
    outcome = module.run(setup)
    outcome.details["card"] = module.card(setup).rows()
    if out is not None and ranks.is_main():
        about = {"model": setup.encoder.name, "weights": setup.encoder.fingerprint(), "data": setup.data.uri}
        if setup.train is not None:
            about["train"] = setup.train.uri
        write_details(out, task, about | _problems(setup) | outcome.details)
        write_metrics(out, task, outcome.metrics)
        forget(setup.work)
    return outcome


def _problems(setup: Setup) -> dict[str, dict[str, list[str]]]:
    """What the sources left out or mended, by URI, to be kept with the results."""
    found = {source.uri: source.problems() for source in (setup.train, setup.data) if source is not None}
    return {"problems": {uri: problems for uri, problems in found.items() if problems}}


def _tell_problems(setup: Setup) -> None:
    for uri, problems in _problems(setup)["problems"].items() if ranks.is_main() else ():
        for problem in problems:
            say(f"In {uri}: {problem}")


def _check_folder(out: Path) -> None:
    """Raise UserError when results could not be put into `out`: before the evaluation, not after it."""
    path = next(path for path in (out, *out.parents) if path.exists())
    if not path.is_dir():
        raise UserError(f"{path} is a file; choose another --out")
    try:
        with TemporaryDirectory(prefix=".harmony-", dir=path):
            pass
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(f"nothing can be written to {path} ({error.strerror}); choose another --out") from None


def _check_one_model(folder: Path, encoder: Encoder) -> None:
    """A folder holds the results of one model, or its table would set numbers of several side by side unsaid.

    The same weights are the same model wherever they lie, and so is a run that has been trained further.
    """
    for path in sorted((folder / "evaluation").glob("*.json")):
        kept = read_details(folder, path.stem) or {}
        other = kept.get("model", encoder.name)
        if other != encoder.name and kept.get("weights") != encoder.fingerprint():
            raise UserError(f"{folder} holds results of {other}; choose another --out for those of {encoder.name}")


def config_for(task: str, settings: Mapping[str, Any]) -> EvaluationConfig:
    """The settings for one task from `--set key=value`, where the task's own keys need not be written `task.key`.

    Raises:
        UserError: a key or a value is wrong.
    """
    own = type(getattr(EvaluationConfig(), task))
    assert issubclass(own, BaseModel)
    of_all = [key for key in EvaluationConfig.model_fields if key not in ("tasks", "model", "train", *TASKS)]
    values: dict[str, Any] = {task: {}}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if section in TASKS and section != task:
            raise UserError(f"{key} is a setting of {section}, and the task is {task}; leave it out")
        if section in ("", task) and name in own.model_fields:
            values[task][name] = value
        elif key in of_all:
            values[key] = value
        else:
            raise unknown(f"setting of {task}", key.removeprefix(f"{task}."), {*own.model_fields, *of_all})
    return validated(EvaluationConfig, values)
