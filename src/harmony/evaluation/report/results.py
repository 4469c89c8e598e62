"""The sections with results: cards, the table of all metrics, per-class bars, confusion and retrieved images."""

from collections.abc import Mapping
from typing import Any

from harmony.evaluation.report.charts import bars, heat_map
from harmony.evaluation.report.html import Html, Section, folded, joined, note, number, percent, picture, table, tag
from harmony.evaluation.report.words import HEADLINES, TASKS, metric
from harmony.evaluation.results import Metrics

MOST_BARS = 60


def results(metrics: Metrics) -> Section:
    """Headline metrics as cards, each beside its chance level, and all metrics in a table."""
    if not metrics:
        return Section("results", "Results", note("Nothing has been evaluated yet; `harmony evaluate` does it."))
    cards = [
        _card(task, name, numbers)
        for task, numbers in metrics.items()
        for name in HEADLINES.get(task, tuple(numbers)[:2])
        if name in numbers
    ]
    tables = [joined([tag("h3", TASKS.get(task, task)), _all(numbers)]) for task, numbers in metrics.items()]
    every = folded("All metrics", tag("div", *(tag("div", part) for part in tables), class_="columns"))
    return Section("results", "Results", joined([tag("div", *cards, class_="cards"), every]))


def _card(task: str, name: str, numbers: Mapping[str, float]) -> Html:
    value, chance = numbers[name], numbers.get(f"chance_{name}")
    parts = [
        tag("span", TASKS.get(task, task), class_="of"),
        tag("span", percent(value), class_="big"),
        tag("span", metric(name)),
    ]
    if chance is not None:
        mark = tag("b", style=f"left:{100 * chance:.2f}%")
        parts.append(tag("span", tag("i", style=f"width:{100 * value:.2f}%"), mark, class_="track"))
        parts.append(tag("span", f"chance {percent(chance)}{_times(value, chance)}", class_="chance"))
    return tag("div", *parts, class_="card")


def _times(value: float, chance: float) -> str:
    ratio = value / chance if chance else 0
    return f" · {ratio:,.0f} times that" if ratio >= 9.5 else f" · {ratio:.1f} times that" if ratio >= 1.05 else ""


def _all(numbers: Mapping[str, float]) -> Html:
    rows = []
    for name, value in numbers.items():
        if not name.startswith("chance_"):
            chance = numbers.get(f"chance_{name}")
            rows.append((metric(name), _written(name, value), "" if chance is None else percent(chance)))
    return table(("metric", "value", "chance"), rows)


def _written(name: str, value: float) -> str:
    """Shares as percentages; counts and ranks as they are."""
    is_share = isinstance(value, float) and 0 <= value <= 1 and "rank" not in name
    return percent(value) if is_share else number(value)


def classes(details: Mapping[str, Any] | None, metrics: Mapping[str, float]) -> Section | None:
    """Accuracy of every class, best first, and what was taken for what."""
    if not details or not details.get("classes"):
        return None
    seen = sorted(details["classes"], key=lambda one: (one["top1"] is None, -(one["top1"] or 0), one["name"]))
    shown = seen if len(seen) <= MOST_BARS else seen[: MOST_BARS // 2] + seen[-MOST_BARS // 2 :]
    rows = [(one["name"], one["top1"], f"of {one['images']}") for one in shown]
    parts = [bars(rows, metrics.get("chance_top1"))]
    lead = f"Share of each class's images that zero-shot classification gets right, with {len(details.get('templates', []))} prompts a class."
    if len(shown) < len(seen):
        lead += f" The best and the worst {MOST_BARS // 2} of {len(seen)} classes."
    confusion = details.get("confusion")
    if confusion:
        names = [one["name"] for one in details["classes"]]
        parts.append(
            tag(
                "figure",
                heat_map(confusion, names),
                tag("figcaption", "Confusion: a row is a true class, a column what it was taken for, both in the order of the data. "
                    "Darker is more often; the diagonal is right. Point at a cell to read it."),
                class_="confusion",
            )
        )  # fmt: skip
        parts.append(_confused(confusion, names))
    return Section("classes", "Class by class", tag("div", *parts, class_="classes"), lead)


def _confused(confusion: list[list[int]], names: list[str]) -> Html:
    pairs = [
        (count, names[row], names[column])
        for row, line in enumerate(confusion)
        for column, count in enumerate(line)
        if row != column and count
    ]
    pairs.sort(key=lambda pair: -pair[0])
    if not pairs:
        return Html("")
    rows = [(true, taken, count) for count, true, taken in pairs[:8]]
    return tag(
        "div",
        tag("h3", "Most frequent confusions"),
        table(("true class", "taken for", "images"), rows),
        class_="confused",
    )


def retrievals(details: Mapping[str, Any] | None, pictures: Mapping[int, str]) -> Section | None:
    """Captions as queries: the best and the worst, with the five images that come first.

    Args:
        details: what the retrieval task kept.
        pictures: position in the source -> data URI.
    """
    found = (details or {}).get("text_to_image")
    if not found:
        return None
    if not pictures:
        return Section(
            "retrievals",
            "Captions and what they find",
            note("The images are no longer where they were evaluated, so none can be shown."),
        )
    parts = []
    for kind, title in (("best", "Found with most confidence"), ("worst", "Furthest off")):
        queries = [_query(query, pictures) for query in found.get(kind, [])]
        parts += [tag("h3", title), tag("div", *queries, class_="queries")] if queries else []
    lead = "Each caption with the five images most similar to it; its own image is outlined. Where that is not among them, it stands behind the dots with its rank."
    return Section("retrievals", "Captions and what they find", joined(parts), lead)


def shown_images(details: Mapping[str, Any] | None) -> list[int]:
    """Positions of all images that `retrievals` would like to show."""
    found = (details or {}).get("text_to_image") or {}
    queries = [query for kind in ("best", "worst") for query in found.get(kind, [])]
    return sorted({query["image"] for query in queries} | {one["image"] for query in queries for one in query["first"]})


def _query(query: Mapping[str, Any], pictures: Mapping[int, str]) -> Html:
    shown = [
        _hit(one["image"], one["image"] == query["image"], f"similarity {one['similarity']:.2f}", pictures)
        for one in query["first"]
    ]
    if all(one["image"] != query["image"] for one in query["first"]):
        shown += [tag("span", "…", class_="dots"), _hit(query["image"], True, f"rank {query['rank']:,}", pictures)]
    rank = "found first" if query["rank"] == 1 else f"rank {query['rank']:,} of {query['pool']:,}"
    caption = tag("p", tag("q", query["caption"]), " ", tag("small", rank))
    return tag("div", caption, tag("div", *shown, class_="strip"), class_="query")


def _hit(image: int, right: bool, says: str, pictures: Mapping[int, str]) -> Html:
    if image not in pictures:
        return tag("span", "not readable", class_="lost")
    kind = "own image" if right else "another image"
    return tag("span", picture(pictures[image], f"{kind}, {says}", class_="own" if right else None), title=says)
