"""From what a user writes to the files that are meant: brace ranges, wildcards, folders."""

import re
from glob import glob, has_magic
from pathlib import Path

from harmony.errors import UserError

_RANGE = re.compile(r"^(-?\d+)\.\.(-?\d+)$")


def nothing_there(uri: str, what: str, place: str) -> UserError:
    """The error for a place that is not there, or that was not given."""
    if not place:
        return UserError(f"{uri} names no {what}: nothing stands behind the colon; add the path")
    ranges = ", or the range, which is written {00000..00012}" if "{" in place else ""
    return UserError(f"{uri} names no {what}: {place} is not there; correct the path{ranges}")


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` to a0, a1, a2 (leading zeros kept, `{000..010}`), `{a,b}c` to ac, bc; nested too."""
    for start, letter in enumerate(pattern):
        end = _closing(pattern, start) if letter == "{" else None
        choices = _choices(pattern[start + 1 : end]) if end is not None else None
        if end is not None and choices is not None:
            inner = [path for choice in choices for path in expand_braces(choice)]
            return [pattern[:start] + path + rest for path in inner for rest in expand_braces(pattern[end + 1 :])]
    return [pattern]


def _closing(pattern: str, start: int) -> int | None:
    """Where the brace that opens at `start` is closed."""
    depth = 0
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0:
            return place
    return None


def _choices(inside: str) -> list[str] | None:
    """What stands between braces: the numbers of a range, or what commas separate; None when it is neither."""
    ends = _RANGE.match(inside)
    if ends:
        first, last = int(ends[1]), int(ends[2])
        padded = any(len(end) > 1 and end.lstrip("-").startswith("0") for end in ends.groups())
        width = max(map(len, ends.groups())) if padded else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    choices = [""]
    depth = 0
    for letter in inside:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            choices.append("")
        else:
            choices[-1] += letter
    return choices if len(choices) > 1 else None


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
    if missing and not Path(pattern).exists() and pattern.count("{") != pattern.count("}"):
        raise UserError(f"{uri} has a brace that is not closed or not opened; write a range as {{00000..00009}}")
    if pattern and not found and Path(pattern).is_dir():
        raise UserError(
            f"{uri} names a folder without *{suffix} files; for a folder of image files write folder:{pattern}"
        )
    if not pattern or not found:
        raise nothing_there(uri, what, pattern)
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of {len(patterns)} {what} of {uri} are missing: {names}; correct the range")
    return list(found)
