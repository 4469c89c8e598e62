"""Class names that lie beside the data or in a file, and labels written as numbers or names."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmony.data.sources.base import BadExample
from harmony.errors import UserError


@dataclass(frozen=True)
class Classes:
    """What a list of classes says, C of them.

    Attributes:
        names: how people and prompts call them, (C,).
        written: how the data writes them, (C,); equal to `names` unless the list has both.
        ignore_index: the value of pixels that belong to none; None where the list does not say.
    """

    names: list[str]
    written: list[str]
    ignore_index: int | None = None


def read_classes(path: Path) -> Classes:
    """The classes in a text file with one name a line, or in a json file.

    The json is a list of names, or an object with "classes", "readable_names" (for prompts) or both, and perhaps
    "ignore_index".

    Raises:
        UserError: the file is something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text; write one class name a line") from error
    return parse_classes(text, str(path), path.suffix.lower() == ".json")


def parse_classes(text: str, where: str, is_json: bool) -> Classes:
    """`read_classes` of a text that was read already; `where` names it in messages."""
    if not is_json:
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if not names:
            raise UserError(f"{where} holds no class names; write one a line")
        return Classes(names, names)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    listed = value if isinstance(value, dict) else {"classes": value}
    lists = [listed[key] for key in ("readable_names", "classes") if listed.get(key)]
    if not lists or not all(_are_names(names) for names in lists):
        raise UserError(f'{where} holds no class names; write ["cat", "dog"] or {{"classes": ["cat", "dog"]}}')
    if len(lists[0]) != len(lists[-1]):
        raise UserError(
            f"{where} has {len(lists[0])} readable_names for {len(lists[-1])} classes; give every class one name"
        )
    ignore = listed.get("ignore_index")
    if ignore is not None and (isinstance(ignore, bool) or not isinstance(ignore, int)):
        raise UserError(f"{where} has the ignore_index {ignore!r}; give a whole number")
    return Classes(lists[0], lists[-1], ignore)


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)


def find_class_list(folder: Path) -> Classes | None:
    """The classes in `classes.json` or `classnames.txt` in `folder`, None when there is neither."""
    return next(
        (read_classes(folder / name) for name in ("classes.json", "classnames.txt") if (folder / name).is_file()), None
    )


def find_classes(folder: Path) -> list[str] | None:
    """The names of those classes."""
    found = find_class_list(folder)
    return None if found is None else found.names


def label_of(written: str, names: Sequence[str] | None, key: str, others: Sequence[str] | None = None) -> int:
    """The class index that a text means: a number, or one of the names (or of `others`, as many); else BadExample."""
    written = written.strip()
    if written.isdigit():
        return int(written)
    for known in (others, names):
        if known and written in known:
            return list(known).index(written)
    raise BadExample(key, f"its class {written[:40]!r} is neither a number nor a known name")
