"""From what a user writes to the files that are meant: brace ranges, wildcards, folders."""

import re
from glob import glob, has_magic
from pathlib import Path

from harmony.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(-?\d+)\.\.(-?\d+)$")


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` to a0, a1, a2 (leading zeros kept, `{000..010}`), `{a,b}c` to ac, bc; nested too."""
    match = None
    for match in _BRACES.finditer(pattern):  # the innermost braces have no others inside
        choices = _choices(match[1])
        if choices is not None:
            break
    else:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    expanded = [expand_braces(f"{before}{choice}{after}") for choice in choices]
    return [path for paths in expanded for path in paths]


def _choices(inside: str) -> list[str] | None:
    ends = _RANGE.match(inside)
    if ends:
        first, last = int(ends[1]), int(ends[2])
        padded = any(len(end) > 1 and end.lstrip("-").startswith("0") for end in ends.groups())
        width = max(map(len, ends.groups())) if padded else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return inside.split(",") if "," in inside else None


def find_files(pattern: str, uri: str, what: str, suffix: str) -> list[Path]:
    """The files that `pattern` names, in order, each once.

    Args:
        pattern: a path, with brace ranges and the wildcards * ? [] and **; or a folder, whose `*suffix` are meant.
        uri: what the user wrote, for messages.
        what: what the files are called in messages, as "shards".
        suffix: ending of the files looked for in a folder.

    Raises:
        UserError: nothing is there, or files of a brace range are missing (the first of them are named).
    """
    if re.match(r"^[a-z][a-z0-9+]*://", pattern):
        raise UserError(f"{uri} is remote; copy the {what} to a local folder and name that")
    pattern = str(Path(pattern).expanduser()) if pattern.startswith("~") else pattern
    patterns = [pattern] if Path(pattern).exists() else expand_braces(pattern)
    found: dict[Path, None] = {}
    missing = []
    for one in patterns:
        path = Path(one)
        if path.is_dir():
            inside = sorted(path.glob(f"*{suffix}"))
        elif path.exists() or not has_magic(one):
            inside = [path] if path.is_file() else []
        else:
            inside = [path for path in sorted(map(Path, glob(one, recursive=True))) if path.is_file()]  # noqa: PTH207
        found.update(dict.fromkeys(inside))
        if not inside:
            missing.append(one)
    if not pattern or not found:
        raise UserError(f"{uri} names no {what}: {pattern or 'no path'} is not there; correct the path")
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of {len(patterns)} {what} of {uri} are missing: {names}; correct the range")
    return list(found)
