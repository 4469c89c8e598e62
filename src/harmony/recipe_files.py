"""Recipe files as plain values: finding them, laying one over another, changing single values, writing them.

A recipe file may say `extends: NAME_OR_FILE`, or a list of them, of which each is laid over the one before; it then
gives only what differs. Sections are merged key by key, anything else is replaced, and `null` under `objectives`,
`views` or `frozen` removes one. Files whose name begins with an underscore are parts of recipes, such as the sizes of
small runs.
"""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from harmony.errors import UserError, unknown

Values = dict[str, Any]

MISSING = "???"
"""Stands for a value that whoever starts the run must give."""
_SHORT = {"image": "name"}
"""Sections that may be written as one word, and the key that the word is for."""

_BARE_MISSING = re.compile(r"(?<![^\s:,\[{])\?\?\?(?![^\s,}\]])")
"""It need not be quoted, although YAML gives a question mark within braces a meaning of its own."""

_FOLDER = Path(__file__).parent / "recipes"
_NOT_INHERITED = ("name", "description", "needs", "proof")
_REMOVABLE = {"objectives": "objective", "views": "view", "frozen": "frozen model"}
_KINDS = {"linear", "cosine", "block", "random", "multi_block"}
"""Keys that say which kind of schedule or of mask a value is."""

_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN)$"
)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: 1e-4 is a number, and no, on and 2024-01-01 are words. No key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the base class does it, but complaining about what it lets pass."""
        self.flatten_mapping(node)
        values: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a word", key_node.start_mark
                )
            if key in values:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            values[key] = self.construct_object(value_node, deep=True)
        return values


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", re.compile(r"^[-+]?[0-9]+$"), "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", re.compile(r"^<<$"), "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
# The constructor of version 1.1 reads a leading zero as octal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would read as something other than a word."""


class _Section(dict[str, Any]):
    """A mapping that is written with a line for each key."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    _Section,
    lambda dumper, section: dumper.represent_mapping("tag:yaml.org,2002:map", section.items(), flow_style=False),
)


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def find(name_or_path: str, beside: Path | None = None) -> Path:
    """The file of a recipe given by name, or by path (relative to the folder `beside`, or to the current one)."""
    if name_or_path in names():
        return _FOLDER / f"{name_or_path}.yaml"
    path = (beside or Path()) / name_or_path
    if path.is_file():
        return path
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if "/" in name_or_path or path.suffix in (".yaml", ".yml"):
        raise UserError(f"there is no recipe file {str(path)!r}; `harmony recipes` lists the recipes known by name")
    raise unknown("recipe", name_or_path, names())


def base(name: str) -> str | None:
    """The recipe that a recipe of the package extends; the first when it extends several."""
    extends = _parse_file(find(name)).get("extends")
    first = extends[0] if isinstance(extends, list) and extends else extends
    return first if isinstance(first, str) else None


def read(name_or_path: str) -> Values:
    """The values of a recipe with what it extends laid underneath; `name` is the file's name unless it says another."""
    return _read(find(name_or_path), within=())


def _as_now_written(values: Values) -> Values:
    """The values of a file, with a setting that has moved since a run wrote it under its new key."""
    objectives = values.get("objectives")
    for name, objective in objectives.items() if isinstance(objectives, dict) else ():
        if isinstance(objective, dict) and (objective.get("type") or name) == "mocov3":
            frozen = objective.pop("freeze_patches", None)
            if frozen is not None:
                values = merged({"model": {"image": {"freeze_patches": frozen}}}, values)
    return values


def _read(path: Path, within: tuple[Path, ...]) -> Values:
    if path.resolve() in within:
        raise UserError(
            f"{path} extends itself ({' -> '.join(p.name for p in (*within, path))}); remove one `extends:`"
        )
    values = _as_now_written(_parse_file(path))
    values.setdefault("name", path.parent.name if path.name == "recipe.yaml" else path.stem)
    extends = values.pop("extends", None)
    if extends is None:
        _check_removals({}, values)
        return values
    below: Values = {}
    for name in extends if isinstance(extends, list) and extends else [extends]:
        if not isinstance(name, str):
            raise UserError(
                f"{path}: extends must be the name or the file of a recipe, or a list of them, not {name!r}"
            )
        below = merged(below, _read(find(name, beside=path.parent), (*within, path.resolve())))
    _check_removals(below, values)
    return merged({key: value for key, value in below.items() if key not in _NOT_INHERITED}, values)


def _parse_file(path: Path) -> Values:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_place(error)} is not valid YAML: {_problem(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a recipe: it must hold keys such as data: and objectives:")
    return values


def parse(text: str) -> Any:
    """The value that YAML text stands for.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(_BARE_MISSING.sub(f'"{MISSING}"', text), Loader=_Loader)


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())


def written(values: Values, width: int = 110) -> str:
    """As YAML text: the sections with a line for each key, the innermost lists and mappings within one line."""
    sections = {key: _Section(value) if isinstance(value, dict) and value else value for key, value in values.items()}
    text = yaml.dump(
        sections, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=width, allow_unicode=True
    )
    return str(text)


def written_in_line(values: Values) -> str:
    """One key and its value as a single line of YAML, however long."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10**6, allow_unicode=True)
    return str(text).strip()[1:-1]


def merged(below: Values, above: Values) -> Values:
    """`above` laid over `below`: sections are merged key by key, everything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if key in _SHORT and isinstance(old, str) and isinstance(value, dict):
            old = {_SHORT[key]: old}
        if isinstance(old, dict) and isinstance(value, dict) and not _is_whole(old, value):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def _is_whole(old: Values, new: Values) -> bool:
    """Whether a new mapping stands for itself: a complete schedule, or another kind of schedule or mask."""
    if is_schedule(new) and {"from", "to"} <= set(next(iter(new.values())) or ()):
        return True
    if is_schedule(old) and len(new) == 1 and not is_schedule(new):
        return True  # a misspelled kind, to be told of as it was written
    return len(old) == len(new) == 1 and set(old) != set(new) and {*old, *new} <= _KINDS


def is_schedule(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("linear", "cosine")


def with_overrides(values: Values, overrides: Iterable[str]) -> Values:
    """The values with each `dotted.key=value` laid over them in turn; the value is read as YAML.

    A length in epochs takes the place of one in steps that the recipe has, as whoever gives it means it.
    """
    overrides = list(overrides)
    keys = {override.partition("=")[0].strip() for override in overrides}
    if "train.epochs" in keys and "train.steps" not in keys:
        values = merged(values, {"train": {"steps": None}})
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"{override!r} is not an override; write key=value, as in train.epochs=10")
        _check_path(values, parts, override)
        changed = _nested(parts, _value(key, text.strip()))
        _check_removals(values, changed)
        values = merged(values, changed)
    return values


def _value(key: str, text: str) -> Any:
    if not text:
        raise UserError(f"{key}= has no value; write {key}=null to leave it out")
    quoted = text[0] in "\"'"
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        if quoted or text[0] in "[{":
            raise UserError(f"the value of {key}={text} is not valid YAML: {_problem(error)}") from None
        return text
    # A path may hold what YAML would take for a comment or a mapping ("a #1", "c: d").
    if not quoted and (isinstance(value, str) or (isinstance(value, dict | list) and text[0] not in "[{")):
        return text
    return value


def _check_path(values: Values, parts: Sequence[str], override: str) -> None:
    section: Any = values
    for depth, part in enumerate(parts[:-1]):
        section = section.get(part)
        if section is None or part in _SHORT:
            return
        if not isinstance(section, dict):
            raise UserError(
                f"the override {override!r} cannot be made: {'.'.join(parts[: depth + 1])} is the value {section!r}, "
                "not a section"
            )


def _check_removals(below: Values, above: Values) -> None:
    """Only what is there can be removed."""
    for section, kind in _REMOVABLE.items():
        there, changed = below.get(section), above.get(section)
        for name, value in changed.items() if isinstance(changed, dict) else ():
            if value is None and name not in (there or {}):
                raise unknown(kind, name, there or {})


def _nested(parts: Sequence[str], value: Any) -> Values:
    for part in reversed(parts):
        value = {part: value}
    return {} | value


def without_removed(values: Values) -> Values:
    """The values without the objectives, views and frozen models that were set to null."""
    kept = dict(values)
    for section in _REMOVABLE:
        if isinstance(kept.get(section), dict):
            kept[section] = {name: value for name, value in kept[section].items() if value is not None}
    return kept


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with its dotted key; lists and schedules count as one value."""
    if prefix and (not isinstance(values, dict) or is_schedule(values) or not values):
        yield prefix, values
        return
    for key, value in values.items():
        yield from flat(value, f"{prefix}.{key}" if prefix else key)


def missing(values: Values) -> list[str]:
    """The dotted keys whose value must still be given."""
    return [key for key, value in flat(values) if value == MISSING]
