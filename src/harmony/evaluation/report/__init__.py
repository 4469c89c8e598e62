"""The report: one self-contained report.html, drawn from what lies in the directory of a run or of results alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harmony import recipe as recipes
from harmony.disk import whole
from harmony.errors import UserError
from harmony.evaluation.report import curves, facts
from harmony.evaluation.report.drawn import drawn
from harmony.evaluation.report.html import Html, Section, tag
from harmony.evaluation.report.images import Images
from harmony.evaluation.report.log import Log
from harmony.evaluation.report.results import results
from harmony.evaluation.report.style import CSS, SCRIPT
from harmony.evaluation.report.tasks import task_section
from harmony.evaluation.results import Metrics, read_details, read_metrics
from harmony.evaluation.settings import TASKS
from harmony.recipe import Recipe
from harmony.training.trained import find_checkpoint

Details = Mapping[str, Mapping[str, Any]]
"""What each task kept for the report, by task; without those that kept nothing."""


def write_report(directory: Path | str) -> Path:
    """Write `directory`/report.html. A part that is not there is left out, or replaced by a sentence.

    Args:
        directory: of a run, or of results that `harmony evaluate --out` put into a folder of their own.

    Raises:
        UserError: there is neither.
    """
    folder = Path(directory)
    if (folder / "recipe.yaml").is_file():
        page = _run_page(folder)
    elif (folder / "metrics.json").is_file():
        page = _results_page(folder)
    else:
        raise UserError(
            f"{directory} holds neither a run (recipe.yaml) nor results (metrics.json); "
            "name a directory that `harmony train` or `harmony evaluate` wrote"
        )
    target = folder / "report.html"
    with whole(target) as aside:
        aside.write_text(page, encoding="utf-8")
    return target


def _run_page(folder: Path) -> str:
    recipe, log, metrics = recipes.load(folder / "recipe.yaml"), Log.read(folder / "log.jsonl"), _ordered(folder)
    checkpoint = _checkpoint(folder)
    state, details = facts.read_state(checkpoint), _details(folder, metrics)
    sections = [
        results(metrics, details, folder),
        curves.losses(log, recipe),
        curves.signs(log, recipe),
        *drawn(folder, recipe, checkpoint),
        *_tasks(metrics, details, recipe),
        curves.optimisation(log, recipe),
        curves.speed(log, recipe),
        facts.whole_recipe(recipe, state, _count_lines(folder / "bad_examples.jsonl")),
    ]
    head = facts.head(folder.resolve().name, recipe, log, state, checkpoint)
    return document(f"{folder.resolve().name} · Harmony", head, [section for section in sections if section])


def _results_page(folder: Path) -> str:
    """The page of results without a run."""
    metrics = _ordered(folder)
    details = _details(folder, metrics)
    sections = [results(metrics, details, folder), *_tasks(metrics, details, None)]
    head = facts.results_head(folder.resolve().name, details, list(metrics))
    return document(f"{folder.resolve().name} · Harmony", head, sections)


def _ordered(folder: Path) -> Metrics:
    """All metrics, in the order of the tasks' list whichever was measured first."""
    metrics = read_metrics(folder)
    known = [task for task in TASKS if task in metrics]
    return {task: metrics[task] for task in (*known, *(task for task in metrics if task not in TASKS))}


def _details(folder: Path, metrics: Metrics) -> Details:
    found = {task: read_details(folder, task) for task in metrics if "/" not in task}
    return {task: kept for task, kept in found.items() if kept}


def _tasks(metrics: Metrics, details: Details, recipe: Recipe | None) -> list[Section]:
    """A section for each task that kept more than its numbers."""
    sections = []
    for task, kept in details.items():
        uri = str(kept.get("data"))
        images = Images.of(uri, recipe.data.options, recipe.data.max_pixels) if recipe else Images.of(uri)
        sections.append(task_section(task, metrics[task], kept, images))
    return sections


def _checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, or None before the first."""
    try:
        return find_checkpoint(str(folder))
    except UserError:
        return None


def _count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8", errors="replace").splitlines()) if path.exists() else 0


def document(title: str, head: Html, sections: Iterable[Section], by: str = "harmony report") -> str:
    """The whole page; `by` is the command that wrote it."""
    every = list(sections)
    links = [tag("a", section.title, href=f"#{section.name}") for section in every]
    body = [
        tag("nav", tag("div", *links)),
        tag("main", head, *(section.html() for section in every), tag("footer", f"Written by {by}.")),
        tag("script", Html(SCRIPT)),
    ]
    top = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(CSS)),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', *top), tag('body', *body), lang='en')}\n"
