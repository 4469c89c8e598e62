"""The head of the page: which run this is, what it learned from and what it cost; and its end: the whole recipe."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harmony.evaluation.report.html import Html, Section, folded, joined, tag
from harmony.evaluation.report.log import Log
from harmony.evaluation.report.results import short_uri
from harmony.evaluation.report.words import TASKS
from harmony.recipe import Recipe
from harmony.training import checkpoints
from harmony.training.progress import spoken


def head(name: str, recipe: Recipe, log: Log, state: Mapping[str, Any], checkpoint: Path | None) -> Html:
    """Title, description, objectives and the facts of the run."""
    facts = [
        ("image encoder", _image_tower(recipe)),
        ("text encoder", _text_tower(recipe)),
        ("parameters", _parameters(checkpoint)),
        ("pairs", _data(recipe, state)),
        ("length", _length(log, state)),
        ("batch", f"{recipe.data.batch_size:,} pairs"),
        ("precision", recipe.train.precision),
        ("training", _time(log)),
    ]
    items = [tag("div", tag("dt", term), tag("dd", value)) for term, value in facts if value]
    chips = [
        tag("li", objective, tag("small", _weight(config.weight)), class_="chip")
        for objective, config in recipe.objectives.items()
    ]
    return tag(
        "header",
        tag("p", "Harmony · report of a run", class_="eyebrow"),
        tag("h1", name),
        tag("p", recipe.description or f"recipe {recipe.name}", class_="lead"),
        tag("ul", *chips, class_="chips"),
        tag("dl", *items, class_="facts"),
    )


def results_head(name: str, details: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> Html:
    """Title and facts of results that stand by themselves: what was measured, on what, in which tasks."""
    models = dict.fromkeys(str(kept["model"]) for kept in details.values() if kept.get("model"))
    data = dict.fromkeys(str(kept["data"]) for kept in details.values() if kept.get("data"))
    facts = [("measured on", "; ".join(map(short_uri, data)))]
    items = [tag("div", tag("dt", term), tag("dd", value)) for term, value in facts if value]
    return tag(
        "header",
        tag("p", "Harmony · report of an evaluation", class_="eyebrow"),
        tag("h1", name),
        tag("p", " and ".join(models) or "results", class_="lead"),
        tag("ul", *(tag("li", TASKS.get(task, task), class_="chip") for task in tasks), class_="chips"),
        tag("dl", *items, class_="facts"),
    )


def whole_recipe(recipe: Recipe, state: Mapping[str, Any], bad: int) -> Section:
    """The resolved recipe and with what it was run."""
    versions = [f"{key} {state[key]}" for key in ("harmony", "torch") if state.get(key)]
    remarks = []
    if versions:
        remarks.append(f"Run with {' and '.join(versions)}.")
    if state.get("skipped"):
        remarks.append(f"{state['skipped']} updates were left out because a loss or a gradient was not finite.")
    if bad:
        remarks.append(f"{bad:,} examples could not be read; bad_examples.jsonl names them.")
    recipe_text = folded("The resolved recipe", tag("pre", recipe.to_yaml()))
    return Section("recipe", "Recipe", joined([tag("p", " ".join(remarks)) if remarks else "", recipe_text]))


def _weight(weight: Any) -> str:
    return f"{weight.start:g}" if weight.start == weight.stop else f"{weight.start:g} → {weight.stop:g}"


def _image_tower(recipe: Recipe) -> str:
    image = recipe.model.image
    changes = [f"{key} {getattr(image, key)}" for key in ("patch", "width", "depth") if getattr(image, key)]
    return ", ".join([image.name, *changes, f"{recipe.largest_view} px"])


def _text_tower(recipe: Recipe) -> str:
    text = recipe.model.text
    return f"transformer, {text.width} wide, {text.layers} deep" if text else "none"


def _parameters(checkpoint: Path | None) -> str:
    """Parameters of both towers as trained, and of what training needs besides, from the checkpoint's header."""
    if checkpoint is None:
        return ""
    counts = {"towers": 0, "heads": 0}
    for name, shape in checkpoints.shapes_of_model(checkpoint).items():
        counts["towers"] += math.prod(shape) if name.startswith("student.") else 0
        counts["heads"] += math.prod(shape) if name.startswith("objectives.") and "teacher" not in name else 0
    return f"{_many(counts['towers'])} in the towers, {_many(counts['heads'])} in heads and decoders"


def _many(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _data(recipe: Recipe, state: Mapping[str, Any]) -> str:
    short = short_uri(recipe.data.train)
    count = (state.get("data") or {}).get("examples")
    return f"{count:,} of {short}" if isinstance(count, int) else short


def _length(log: Log, state: Mapping[str, Any]) -> str:
    step, epoch = log.last("step") or state.get("step"), log.last("epoch")
    if not step:
        return ""
    planned = state.get("steps")
    parts = [f"{step:,.0f} steps" if not planned or planned == step else f"{step:,.0f} of {planned:,} steps"]
    if epoch:
        parts.append(f"{epoch:.3g} epochs")
    if examples := log.last("examples"):
        parts.append(f"{examples:,.0f} pairs seen")
    return ", ".join(parts)


def _time(log: Log) -> str:
    seconds, examples, memory = log.training_seconds(), log.last("examples"), log.last("memory_gib")
    if not seconds or not examples:
        return ""
    return f"{spoken(seconds)} at {examples / seconds:,.3g} pairs a second" + (f", {memory:.3g} GiB" if memory else "")


def read_state(checkpoint: Path | None) -> dict[str, Any]:
    """The checkpoint's state.json as it is; empty when there is none."""
    try:
        return dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))) if checkpoint else {}
    except (OSError, ValueError):
        return {}
