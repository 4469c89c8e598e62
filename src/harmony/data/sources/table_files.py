"""Tables as Arrow columns: csv, tsv, jsonl and parquet files, of which only the columns that are wanted are read."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from harmony.errors import UserError

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

_DELIMITERS = ",\t;|"
_LINES_LOOKED_AT = 100
_LINES_AT_ONCE = 65536


def column_names(path: Path) -> list[str]:
    """The names of a table's columns; of jsonl, the keys in its first 100 lines.

    Raises:
        UserError: the file is no such table, or empty.
    """
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} is no table that can be read; use one of {', '.join(SUFFIXES)}")
    try:
        if kind == "csv":
            names = _header(path)[0]
        elif kind == "jsonl":
            lines = [line for line, _ in zip(_json_lines(path), range(_LINES_LOOKED_AT), strict=False)]
            names = list({name: None for line in lines if line for name in line})
            if lines and not names:
                raise UserError(f"{path} has no line that is a JSON object with keys; write one on each line")
        else:
            names = list(pa.parquet.read_schema(path).names)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    if not names:
        raise UserError(f"{path} has no columns; is it empty?")
    return names


def read_columns(path: Path, names: Sequence[str]) -> tuple[pa.Table, int]:
    """The columns `names` of a table, and how many of its lines are damaged and were left out.

    Texts in csv stay as they are written ("NA" and "12" too). A column that a table lacks is all null.

    Raises:
        UserError: the file cannot be read as what its suffix says.
    """
    read: Callable[[Path, Sequence[str]], tuple[pa.Table, int]]
    read = {"csv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}[SUFFIXES[path.suffix.lower()]]
    try:
        return read(path, names)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(f"{path} cannot be read as {path.suffix[1:]} in UTF-8 ({reason}); correct or convert the file")


def _header(path: Path) -> tuple[list[str], str]:
    """The names in the first line of a csv file and what separates them."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        line = file.readline()
    delimiter = max(_DELIMITERS, key=line.count) if path.suffix.lower() != ".tsv" else "\t"
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])], delimiter


def _read_csv(path: Path, names: Sequence[str]) -> tuple[pa.Table, int]:
    header, delimiter = _header(path)
    present = [name for name in names if name in header]
    damaged = 0

    def leave_out(_: object) -> str:
        nonlocal damaged
        damaged += 1
        return "skip"

    table = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(column_names=header, skip_rows=1, use_threads=False),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=leave_out, ignore_empty_lines=True
        ),
        convert_options=pa.csv.ConvertOptions(
            include_columns=present,
            column_types={name: pa.large_string() for name in present},
            strings_can_be_null=False,
        ),
    )
    return _with_all(table, names), damaged


def _read_parquet(path: Path, names: Sequence[str]) -> tuple[pa.Table, int]:
    present = set(pa.parquet.read_schema(path).names)
    table = pa.parquet.read_table(path, columns=[name for name in names if name in present], partitioning=None)
    return _with_all(table, names), 0


def _with_all(table: pa.Table, names: Sequence[str]) -> pa.Table:
    for name in names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), pa.large_string()))
    return table.select(list(names))


def _read_jsonl(path: Path, names: Sequence[str]) -> tuple[pa.Table, int]:
    """Every value as text or as a list of texts, as `plain` says."""
    damaged = 0
    chunks: list[list[pa.Array]] = [[] for _ in names]
    rows: list[dict[str, Any]] = []

    def flush() -> None:
        for chunk, name in zip(chunks, names, strict=True):
            chunk.append(pa.array([plain(row.get(name)) for row in rows], pa.list_(pa.large_string())))
        rows.clear()

    for row in _json_lines(path):
        if row is None:
            damaged += 1
            continue
        rows.append(row)
        if len(rows) == _LINES_AT_ONCE:
            flush()
    flush()
    return pa.table({name: pa.chunked_array(chunk) for name, chunk in zip(names, chunks, strict=True)}), damaged


def plain(value: Any) -> list[str] | None:
    """A json value as a list of texts: of one, several, or None where there is nothing of use."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [f"{value:g}" if isinstance(value, float) else str(value)]
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str)]
    return None


def _json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line's object; None for a line that holds none. Blank lines are passed over."""
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:  # also of bytes that are not UTF-8
                value = None
            yield value if isinstance(value, dict) else None
