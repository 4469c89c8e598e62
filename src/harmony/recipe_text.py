"""A recipe as YAML in which every setting is explained beside its value."""

import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from harmony import recipe_files
from harmony.recipe import Recipe
from harmony.recipe_files import is_schedule

_COLUMN = 52
"""Where the explanations begin."""


def explained(recipe: Recipe, width: int = 120) -> str:
    """YAML text that loads to an equal recipe, with what each setting means as comments, about `width` columns wide."""
    return "\n".join(line for line in _lines(recipe, recipe.to_dict(), 0, width)) + "\n"


def _lines(owner: Any, values: dict[str, Any], indent: int, width: int) -> Iterator[str]:
    """The lines of one section; `values` is what its settings object, or mapping of such, is written as."""
    for key, value in values.items():
        inner, meaning = _inside(owner, key)
        if indent == 0 and isinstance(value, dict):
            yield ""
        if key in ("name", "description", "needs", "family", "paper", "proof") and indent == 0:
            yield recipe_files.written_in_line({key: value})
        elif isinstance(value, dict) and value and not is_schedule(value):
            yield from _beside(f"{' ' * indent}{key}:", meaning, width)
            yield from _lines(inner, value, indent + 2, width)
        else:
            line = " " * indent + recipe_files.written_in_line({key: value})
            fits = len(line) <= width or not isinstance(value, list)
            first, *rest = [line] if fits else _over_lines(key, value, indent, width)
            yield from _beside(first, meaning, width)
            yield from rest


def _over_lines(key: str, value: list[Any], indent: int, width: int) -> list[str]:
    """A list that is too long for one line."""
    return [" " * indent + line for line in recipe_files.written({key: value}, width - indent).splitlines()]


def _inside(owner: Any, key: str) -> tuple[Any, str | None]:
    """What stands under a key of settings or of a mapping, and what it means."""
    if not isinstance(owner, BaseModel):
        return owner[key], None
    if key not in type(owner).model_fields:  # settings written under the name of their kind, as {block: {...}}
        return owner, None
    return getattr(owner, key), type(owner).model_fields[key].description


def _beside(setting: str, meaning: str | None, width: int) -> Iterator[str]:
    """The setting with its meaning behind it, going on below where it is long."""
    column = max(min(_COLUMN, width // 2), len(setting) + 2)
    told = textwrap.wrap(meaning or "", max(width - column - 2, 24))
    yield f"{setting.ljust(column)}# {told[0]}" if told else setting
    for rest in told[1:]:
        yield f"{' ' * column}# {rest}"
