"""Where the classes of masks are named: classes.json, ADE20K's table, a file, or only their number."""

import csv
from pathlib import Path

from harmony.data.sources.classes import Classes, find_class_list, parse_classes, read_classes
from harmony.data.sources.named_files import NamedFiles
from harmony.errors import UserError

ADE_NAMES = "objectInfo150.txt"
ADE_CLASSES = 150
_MOST = 65535


def given_classes(given: str, uri: str) -> Classes:
    """The classes that a URI names: a file, or how many there are.

    Raises:
        UserError: no such file, a file of another kind, or a number out of range.
    """
    if given.isdigit():
        if not 1 <= int(given) <= _MOST:
            raise UserError(f"{uri} is to have {given} classes; give a number from 1 to {_MOST}")
        return numbered(int(given))
    path = Path(given).expanduser()
    if not path.is_file():
        raise UserError(f"the class list {path} is not there; correct classes=, or give the number of classes")
    return (
        _table(path.read_text(encoding="utf-8", errors="replace"), given)
        if path.name == ADE_NAMES
        else read_classes(path)
    )


def found_classes(files: NamedFiles, uri: str) -> Classes | None:
    """The classes named in the data, or beside it; None when nothing names them."""
    listed, table = (int(number) for number in files.find(["classes.json", ADE_NAMES]))
    if listed >= 0:
        text = files.read(listed, uri).decode("utf-8", "replace")
        return parse_classes(text, f"classes.json of {uri}", is_json=True)
    if table >= 0:
        return _table(files.read(table, uri).decode("utf-8", "replace"), f"{ADE_NAMES} of {uri}")
    return find_class_list(files.place.parent)


def numbered(count: int) -> Classes:
    """Classes without names of their own."""
    names = [f"class {i}" for i in range(count)]
    return Classes(names, names)


def _table(text: str, where: str) -> Classes:
    """The first of the synonyms in the column Name of ADE20K's table."""
    header, *lines = text.splitlines() or [""]
    rows = csv.DictReader(lines, [column.strip() for column in header.split("\t")], delimiter="\t")
    names = [(row.get("Name") or "").split(",")[0].strip() for row in rows]
    if not names or not all(names):
        raise UserError(f"{where} is no table with a column Name, as ADE20K has it; give ?classes=FILE")
    return Classes(names, names)
