"""Captions as queries: the best and the worst, with the five images that come first."""

from collections.abc import Mapping
from typing import Any

from harmony.evaluation.report.html import Html, note, picture, tag


def retrievals(details: Mapping[str, Any], pictures: Mapping[int, str]) -> list[Html]:
    """The queries that the retrieval task kept.

    Args:
        details: what the task kept.
        pictures: position in the source -> data URI.
    """
    found = details.get("text_to_image")
    if not found:
        return []
    if not pictures:
        return [note("The images are no longer where they were evaluated.")]
    parts: list[Html] = []
    for kind, heading in (("best", "Found with most confidence"), ("worst", "Furthest off")):
        queries = [_query(query, pictures) for query in found.get(kind, [])]
        parts += [tag("h3", heading), tag("div", *queries, class_="queries")] if queries else []
    return parts


def shown_images(details: Mapping[str, Any]) -> list[int]:
    """Positions of all images that `retrievals` would like to show."""
    found = details.get("text_to_image") or {}
    queries = [query for kind in ("best", "worst") for query in found.get(kind, [])]
    return sorted({query["image"] for query in queries} | {one["image"] for query in queries for one in query["first"]})


def _query(query: Mapping[str, Any], pictures: Mapping[int, str]) -> Html:
    own, first = query["image"], query["first"]
    shown = [_hit(one["image"], one["image"] == own, f"similarity {one['similarity']:.2f}", pictures) for one in first]
    if all(one["image"] != own for one in first):
        shown += [tag("span", "…", class_="dots"), _hit(own, True, f"rank {query['rank']:,}", pictures)]
    rank = "found first" if query["rank"] == 1 else f"rank {query['rank']:,} of {query['pool']:,}"
    caption = tag("p", tag("q", query["caption"]), " ", tag("small", rank))
    return tag("div", caption, tag("div", *shown, class_="strip"), class_="query")


def _hit(image: int, right: bool, says: str, pictures: Mapping[int, str]) -> Html:
    if image not in pictures:
        return tag("span", "not readable", class_="lost")
    alt = f"{'own image' if right else 'another image'}, {says}"
    return tag("span", picture(pictures[image], alt, class_="own" if right else None), title=says)
