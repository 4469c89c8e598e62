"""The one exception that means "the input was wrong", and the words that help to mend it."""

from collections.abc import Iterable
from difflib import get_close_matches

MOST_LISTED = 40
"""Names that are listed when none is near; where there are more, the first few are, as examples."""


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
    lower = {known_name.lower(): known_name for known_name in names}
    near = [lower[match] for match in get_close_matches(name.lower(), lower, n=1, cutoff=0.5)]
    shown = names if len(names) <= MOST_LISTED else names[:5]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    hint = f"did you mean {within + near[0]!r}?" if near else f"known: {', '.join(shown) or 'none'}{more}"
    return UserError(f"unknown {kind} {within + name!r}; {hint}")
