"""One section a task: what it shows of its own, and its protocol."""

from collections.abc import Mapping
from typing import Any

from harmony.evaluation.report.boxes import boxes
from harmony.evaluation.report.classes import accuracies
from harmony.evaluation.report.html import Html, Section, folded, joined, percent, tag
from harmony.evaluation.report.images import Images
from harmony.evaluation.report.probes import grid, training, votes
from harmony.evaluation.report.retrievals import retrievals, shown_images
from harmony.evaluation.report.segments import segments
from harmony.evaluation.report.words import CARD, SAYS, TASKS, chance_of, headlines, metric

THUMBNAIL = 128
"""Side in px of the images among the retrievals."""


def task_section(task: str, metrics: Mapping[str, float], details: Mapping[str, Any], images: Images) -> Section:
    """The section of a task.

    Args:
        task: its name, which is the section's anchor too.
        metrics: its numbers.
        details: what it kept (see its `run`); whatever is missing is left out.
        images: those it was measured on.
    """
    parts = [_about(task, metrics, details)]
    if task == "retrieval":
        parts += retrievals(details, images.squares(shown_images(details), THUMBNAIL))
    elif task == "segmentation":
        parts += segments(details, images)
    elif task == "detection":
        parts += boxes(details, images)
    else:
        parts += [*votes(metrics), *grid(details), *training(details)]
        parts += accuracies(details, chance_of("top1", metrics))
    parts.append(_card(details))
    return Section(task, TASKS.get(task, task.replace("_", " ")), joined(parts), SAYS.get(task, ""))


def _about(task: str, metrics: Mapping[str, float], details: Mapping[str, Any]) -> Html:
    """What was measured on what, and the first numbers."""
    facts = [
        ("model", details.get("model")),
        ("measured on", details.get("data")),
        ("learned from", details.get("train")),
    ]
    for name in headlines(task, metrics)[:2]:
        chance = chance_of(name, metrics)
        value = percent(metrics[name]) if 0 <= metrics[name] <= 1 else f"{metrics[name]:g}"
        facts.append((metric(name), value if chance is None else f"{value}, chance {percent(chance)}"))
    problems = details.get("problems") or {}
    facts += [("in the data", f"{problem} ({uri})") for uri, found in problems.items() for problem in found]
    items = [tag("div", tag("dt", term), tag("dd", value)) for term, value in facts if value]
    return tag("dl", *items, class_="facts about")


def _card(details: Mapping[str, Any]) -> Html:
    """The protocol card, folded away."""
    rows = details.get("card") or {}
    if not rows:
        return Html("")
    items = [tag("div", tag("dt", CARD.get(name, name)), tag("dd", value)) for name, value in rows.items()]
    return folded("Protocol", tag("dl", *items, class_="card-rows"))
