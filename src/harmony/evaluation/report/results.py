"""The section with results: cards, one table of all tasks with what papers report, and all metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harmony.evaluation.report import papers
from harmony.evaluation.report.html import Html, Section, folded, joined, note, number, percent, table, tag
from harmony.evaluation.report.words import BOTH, COUNTS, TASKS, chance_of, headlines, metric
from harmony.evaluation.results import Metrics

_FEW = 3
"""Up to so many tasks each has several cards."""


def results(metrics: Metrics, details: Mapping[str, Mapping[str, Any]], folder: Path) -> Section:
    """Headline metrics as cards, each beside its chance level; all tasks in one table; all metrics folded away.

    Args:
        metrics: by task.
        details: what each task kept, by task.
        folder: where they come from, for the command that makes the first of them.
    """
    if not metrics:
        command = tag("code", f"harmony evaluate {folder} --task zero_shot --data URI --out {folder}")
        told = joined(["Nothing has been evaluated yet; ", command, " does it."])
        return Section("results", "Results", note(told))
    most = 4 if len(metrics) == 1 else 2 if len(metrics) <= _FEW else 1
    cards = [
        _card(task, name, numbers) for task, numbers in metrics.items() for name in headlines(task, numbers)[:most]
    ]
    tables = [tag("div", tag("h3", TASKS.get(task, task)), _all(numbers)) for task, numbers in metrics.items()]
    parts = [
        tag("div", *cards, class_="cards"),
        tag("h3", "All tasks"),
        _overview(metrics, details),
        _reported(metrics),
        folded("All metrics", tag("div", *tables, class_="columns")),
    ]
    return Section("results", "Results", joined(parts))


def _card(task: str, name: str, numbers: Mapping[str, float]) -> Html:
    value, chance = numbers[name], chance_of(name, numbers)
    parts = [
        tag("span", TASKS.get(task, task), class_="of"),
        tag("span", written(name, value), class_="big"),
        tag("span", metric(name)),
    ]
    if 0 <= value <= 1:
        fill = tag("i", style=f"width:{100 * value:.2f}%")
        mark = "" if chance is None else tag("b", style=f"left:{100 * chance:.2f}%")
        parts.append(tag("span", fill, mark, class_="track"))
        if chance is not None:
            parts.append(tag("span", beside_chance(value, chance), class_="chance"))
    return tag("div", *parts, class_="card")


def beside_chance(value: float, chance: float) -> str:
    """How far a value is above chance, in words."""
    ratio = value / chance if chance else 0
    if ratio < 1.05:
        return f"chance is {percent(chance)}"
    return f"{ratio:,.{0 if ratio >= 9.5 else 1}f} times the chance of {percent(chance)}"


def _overview(metrics: Metrics, details: Mapping[str, Mapping[str, Any]]) -> Html:
    """One row a task, two where two metrics are of equal rank."""
    rows = []
    for task, numbers in metrics.items():
        kept = details.get(task)
        title = tag("a", TASKS.get(task, task), href=f"#{task}") if kept else TASKS.get(task, task)
        for place, name in enumerate(headlines(task, numbers)[: 2 if task in BOTH else 1]):
            chance, paper = chance_of(name, numbers), papers.first(task, name)
            rows.append(
                (
                    "" if place else title,
                    metric(name),
                    tag("strong", written(name, numbers[name])),
                    "" if chance is None else percent(chance),
                    "" if paper is None else _cited(paper),
                    "" if place else tag("small", short_uri(str((kept or {}).get("data", ""))), class_="uri"),
                )
            )
    head = ("task", "metric", "value", "chance", "for orientation, a paper's", "data")
    return table(head, rows, words=(1, 4, 5))


def _cited(paper: papers.Reported) -> Html:
    short = ", ".join(part.partition(",")[0] for part in (paper.model, paper.data))
    return joined([percent(paper.value), tag("small", short)], " ")


def _reported(metrics: Metrics) -> Html:
    """What papers report of these tasks, with sources."""
    rows = [
        (TASKS[task], one.model, one.data, metric(one.metric), percent(one.value), one.source)
        for task in metrics
        for one in papers.PAPERS.get(task, ())
    ]
    if not rows:
        return Html("")
    says = (
        "These are numbers of other models, on other data, at another scale and often by another protocol. They say "
        "what is possible, not what this run should reach; to compare, measure both by the same command."
    )
    head = ("task", "model", "measured on", "metric", "value", "source")
    return folded("What papers report", joined([tag("p", says, class_="says"), table(head, rows, words=(1, 2, 3, 5))]))


def _all(numbers: Mapping[str, float]) -> Html:
    rows = []
    for name, value in numbers.items():
        if not name.startswith("chance_"):
            chance = chance_of(name, numbers)
            rows.append((metric(name), written(name, value), "" if chance is None else percent(chance)))
    return table(("metric", "value", "chance"), rows)


def written(name: str, value: float) -> str:
    """Shares as percentages; counts and ranks as they are."""
    is_share = isinstance(value, float) and 0 <= value <= 1 and "rank" not in name and name not in COUNTS
    return percent(value) if is_share else number(value)


def short_uri(uri: str) -> str:
    """A data URI with all but the last two parts of its path, and of the paths among its settings, left out."""
    kind, _, place = uri.partition(":")
    path, mark, settings = place.partition("?")
    short = "&".join(f"{name}{equals}{_ending(value)}" for name, equals, value in map(_parted, settings.split("&")))
    return f"{kind}:{' ' if path.count('/') > 1 else ''}{_ending(path)}{mark}{short}"


def _parted(setting: str) -> tuple[str, str, str]:
    return setting.partition("=")


def _ending(path: str) -> str:
    return f"…/{'/'.join(path.split('/')[-2:])}" if path.count("/") > 1 else path
