"""Class names that lie beside the data, and labels written as numbers or names."""

import json
from collections.abc import Sequence
from pathlib import Path

from harmony.data.sources.base import BadExample
from harmony.errors import UserError


def find_classes(folder: Path) -> list[str] | None:
    """The class names in `classes.json` or `classnames.txt` in `folder`, None when there is neither.

    `classes.json` is a list, or an object with "readable_names" or "classes"; `classnames.txt` has one name a line.

    Raises:
        UserError: `classes.json` is something else.
    """
    listed, lines = folder / "classes.json", folder / "classnames.txt"
    if listed.is_file():
        try:
            value = json.loads(listed.read_text(encoding="utf-8"))
        except ValueError:
            value = None
        names = (value.get("readable_names") or value.get("classes")) if isinstance(value, dict) else value
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            raise UserError(f'{listed} holds no class names; write ["cat", "dog"] or {{"classes": ["cat", "dog"]}}')
        return names
    if lines.is_file():
        return [line.strip() for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    return None


def label_of(written: str, names: Sequence[str] | None, key: str) -> int:
    """The class index that a text means: a number, or one of the names; BadExample when it is neither."""
    written = written.strip()
    if written.isdigit():
        return int(written)
    if names and written in names:
        return list(names).index(written)
    raise BadExample(key, f"its class {written[:40]!r} is neither a number nor a known name")
