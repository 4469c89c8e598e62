"""Settings from plain values, with a mistake told in one sentence: the key, what is wrong, what is allowed."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from harmony.errors import UserError, unknown

Model = TypeVar("Model", bound=BaseModel)
Path = tuple[str | int, ...]
"""Keys and list places from the outermost section inward."""

_LIMITS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_KINDS = (
    ("int_", "a whole number"),
    ("float_", "a number"),
    ("bool_", "true or false"),
    ("string_", "text"),
    ("list_", "a list"),
    ("tuple_", "a list"),
    ("dict_", "a section with keys"),
    ("model_", "a section with keys"),
    ("finite_number", "a finite number"),
)
"""What pydantic's types of error ask for, by how their names begin."""


def validated(settings: type[Model], values: Any, where: str = "", **context: Any) -> Model:
    """The settings that the values stand for.

    Args:
        settings: the class that says which keys there are.
        values: plain values, as a YAML file gives them.
        where: the dotted key the values stand under in the recipe.
        context: what the settings' own checks may want to know besides.

    Raises:
        UserError: the first thing that is wrong, in one sentence.
    """
    _check_numbers(values, settings, where)
    try:
        return settings.model_validate(values, context=context)
    except ValidationError as error:
        raise _explained(error, settings, values, where) from None


def _check_numbers(values: Any, settings: type[BaseModel], where: str) -> None:
    """Refuse what pydantic takes for a number although nobody means one: true and false, nan and inf."""
    for path, value in _leaves(values):
        allowed = _types_at(settings, path)
        if bool in allowed or not {int, float} & set(allowed):
            continue
        if isinstance(value, bool):
            kind = "a number" if float in allowed else "a whole number"
            raise UserError(f"{dotted(path, where)} must be {kind}, not {_shown(value)}")
        if str not in allowed and not _finite(value):
            raise UserError(f"{dotted(path, where)} must be a finite number, not {value}")


def _leaves(values: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Each value that is no section and no list, with its path."""
    if isinstance(values, Mapping | list | tuple):
        for part, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _leaves(value, (*path, part))
    else:
        yield path, values


def _finite(value: Any) -> bool:
    """False for numbers that are not, also when they are written as text."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return True


def _explained(error: ValidationError, settings: type[BaseModel], values: Any, where: str) -> UserError:
    """The first problem; where a value could be read in several ways, those that got furthest speak."""
    problems = [(_path(problem, values), problem) for problem in error.errors(include_url=False)]
    start = problems[0][0]
    alike = [(path, problem) for path, problem in problems if path[: len(start)] == start]
    furthest = max((path for path, _ in alike), key=len)
    return _told([problem for path, problem in alike if path == furthest], furthest, settings, where)


def _path(problem: ErrorDetails, values: Any) -> Path:
    """The problem's place in the values; the parts that only name a member of a union are left out."""
    path: list[str | int] = []
    here = values
    for part in problem["loc"]:
        is_key = isinstance(here, Mapping) and part in here
        is_place = isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)
        if is_key or is_place:
            here = here[part]
            path.append(part)
    if problem["type"] == "missing":
        path.append(problem["loc"][-1])
    return tuple(path)


def _told(problems: Sequence[ErrorDetails], path: Path, settings: type[BaseModel], where: str) -> UserError:
    key = dotted(path, where)
    by_type = {problem["type"]: problem for problem in problems}
    if "extra_forbidden" in by_type:
        return _unknown_key(path, settings, where)
    if "missing" in by_type and isinstance(path[-1], int):
        wanted = next(get_args(member) for member in _types_at(settings, path[:-1]) if get_origin(member) is tuple)
        kind = "numbers" if {int, float} & set(_types_at(settings, path)) else "values"
        count = {2: "two", 3: "three"}.get(len(wanted), str(len(wanted)))
        return UserError(f"{dotted(path[:-1], where)} needs {count} {kind}, not {_shown(by_type['missing']['input'])}")
    if "missing" in by_type:
        return UserError(f"{key} is missing; give it a value{_purpose(path, settings)}")
    if "value_error" in by_type:
        told = str(by_type["value_error"]["ctx"]["error"])
        return UserError(f"{key} {told}" if re.match(r"(must|is|has|needs)\b", told) else f"{key}: {told}")
    given = problems[0]["input"]
    allowed = " or ".join(dict.fromkeys(_expected(problem, path, settings) for problem in problems))
    near = get_close_matches(str(given).lower(), _choices(path, settings), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else _purpose(path, settings)
    return UserError(f"{key} must be {allowed}, not {_shown(given)}{hint}")


def _expected(problem: ErrorDetails, path: Path, settings: type[BaseModel]) -> str:
    """What would have been right, to follow "must be"."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _LIMITS:
        name, word = _LIMITS[kind]
        return f"{word} {context[name]:g}"
    if kind == "literal_error":
        choices = _choices(path, settings)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else str(context["expected"])
    if kind in ("too_short", "too_long"):
        word, count = ("at least", context["min_length"]) if kind == "too_short" else ("at most", context["max_length"])
        return f"{word} {count} values"
    for start, words in _KINDS:
        if kind.startswith(start):
            return words
    return f"something else ({problem['msg'][0].lower()}{problem['msg'][1:]})"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def dotted(path: Path, where: str = "") -> str:
    """`views.global.scale[0]` for a path within the section `where`."""
    text = where
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "it"


def _unknown_key(path: Path, settings: type[BaseModel], where: str) -> UserError:
    *section, name = path
    owner = settings_at(settings, tuple(section))
    known = list(owner.model_fields) if owner else []
    within = f"{dotted(tuple(section), where)}." if section or where else ""
    elsewhere = [key for key in _all_keys(settings) if key.split(".")[-1] == name]
    if elsewhere and not get_close_matches(str(name), known, n=1, cutoff=0.75):
        shallowest = min(key.count(".") for key in elsewhere)
        nearest = [key for key in elsewhere if key.count(".") == shallowest][:3]
        meant = " or ".join(repr(f"{where}.{key}" if where else key) for key in nearest)
        return UserError(f"unknown key {within + str(name)!r}; did you mean {meant}?")
    return unknown("key", str(name), known, within)


def _purpose(path: Path, settings: type[BaseModel]) -> str:
    """What the setting is for, in brackets."""
    owner = settings_at(settings, path[:-1]) if path else None
    field = owner.model_fields.get(str(path[-1])) if owner else None
    return f" ({field.description})" if field and field.description else ""


def _all_keys(settings: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that is known beforehand; what stands under names the user chooses is not."""
    found = []
    for name, field in settings.model_fields.items():
        found.append(prefix + name)
        for member in _members(field.annotation):
            found += _all_keys(member, f"{prefix}{name}.") if _is_settings(member) else []
    return found


def settings_at(settings: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The class of the section that stands at a path within another; None where there is no section."""
    return next((member for member in _types_at(settings, path) if _is_settings(member)), None)


def _types_at(settings: type[BaseModel], path: Path) -> list[Any]:
    """The types that a value at a path within a section may have; none where the path leads nowhere."""
    here: list[Any] = [settings]
    for part in path:
        here = [inner for member in here for inner in _inside(member, part)]
    return here


def _inside(member: Any, part: str | int) -> list[Any]:
    """The types that may stand under a key or at a list place of a type."""
    if _is_settings(member):
        return _members(member.model_fields[str(part)].annotation) if part in member.model_fields else []
    arguments = get_args(member)
    return _members(arguments[-1 if get_origin(member) is dict else 0]) if arguments else []


def _choices(path: Path, settings: type[BaseModel]) -> list[str]:
    """The words that a setting may be."""
    members = _types_at(settings, path) if path else []
    return [str(word) for member in members if get_origin(member) is Literal for word in get_args(member)]


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a type, without what annotates them."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _is_settings(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
