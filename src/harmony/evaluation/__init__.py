"""Evaluation: what a representation is worth, task by task, and the report of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harmony.recipe import Recipe

# The functions import when they are called: recipes need only this package's settings, and the tasks need recipes.


def run(
    where: str,
    task: str,
    data_uri: str,
    train_uri: str | None = None,
    model: str | None = None,
    settings: dict[str, Any] | None = None,
    out: Path | str | None = None,
) -> dict[str, float]:
    """Measure one task; see `harmony.evaluation.tasks.run`."""
    from harmony.evaluation import tasks

    return tasks.run(where, task, data_uri, train_uri, model, settings, out).metrics


def evaluate_run(run_dir: Path | str, recipe: "Recipe") -> dict[str, dict[str, float]]:
    """Measure a run by its recipe's own settings; see `harmony.evaluation.tasks.evaluate_run`."""
    from harmony.evaluation import tasks

    return tasks.evaluate_run(run_dir, recipe)
