"""The one exception that means "the input was wrong", and the words that help to mend it."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user gave cannot work.

    The message is one clear sentence that says what to change. The command line prints it without a traceback and
    leaves with exit status 2.
    """


def unknown(kind: str, name: str, known: Iterable[str], within: str = "") -> UserError:
    """An error for a name that is not among `known`: it suggests the nearest one, or else lists all.

    `within` is put before the names it prints ("optim." for the keys of the section optim).
    """
    names = sorted(known)
    written = {one.lower(): one for one in names}
    near = get_close_matches(name.lower(), written, n=1, cutoff=0.5)
    hint = f"did you mean {within + written[near[0]]!r}?" if near else f"known: {', '.join(names) or 'none'}"
    return UserError(f"unknown {kind} {within + name!r}; {hint}")
