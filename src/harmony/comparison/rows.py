"""The rows of a comparison, as its command line names them.

    harmony compare clip-small quickstart "quickstart objectives.mae=null name=no-mae" train.steps=100

A word `key=value` is an override of every row. Anything else is a row: a recipe, alone or, within quotes, with
overrides of its own, as they would follow `harmony train`; its name is the recipe's, followed by its own overrides
unless one of them is `name=...`.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harmony import recipe_files
from harmony.errors import UserError
from harmony.recipe_files import Values

UNTRAINED = "untrained"
"""The row that every comparison has besides: the model as it is before training."""

LONGEST_FOLDER = 200
"""Bytes of a row's directory name; file systems stop at 255, and what is written aside needs a few."""

_OVERRIDE = re.compile(r"\s*[^\s/=]+\s*=")
"""How an override begins. A path has a slash before any equals sign, a row with overrides of its own has a blank."""


@dataclass(frozen=True)
class Asked:
    """A row as it was asked for.

    Attributes:
        name: what the table calls it.
        recipe: name or file of its recipe.
        own: overrides of this row alone.
    """

    name: str
    recipe: str
    own: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Its name as that of a directory."""
        return re.sub(r"[^\w.,=+-]+", "-", self.name).strip("-.") or "row"

    def values(self, shared: Sequence[str] = ()) -> Values:
        """The recipe's values with `shared` and then its own overrides laid over them, not yet validated."""
        return recipe_files.with_overrides(recipe_files.read(self.recipe), [*shared, *self.own])


def read(arguments: Sequence[str]) -> tuple[list[Asked], list[str]]:
    """Rows and shared overrides of a command line.

    Raises:
        UserError: there are fewer than two rows, two of one name, or one that cannot be read.
    """
    shared = [word for word in arguments if _OVERRIDE.match(word)]
    rows = [_row(word) for word in arguments if not _OVERRIDE.match(word)]
    if len(rows) < 2:
        named = f"only {rows[0].name!r}" if rows else "none"
        raise UserError(
            f"a comparison needs two recipes or more, and there is {named}; `harmony recipes` lists the recipes, and "
            '"RECIPE key=value" within quotes is a row with a change of its own'
        )
    _check_names(rows)
    return rows, shared


def key_of(override: str) -> str:
    return override.partition("=")[0].strip()


def _row(word: str) -> Asked:
    recipe, *own = [word] if "=" not in word or _is_there(word) else _split(word)
    for override in own:
        if not _OVERRIDE.match(override):
            raise UserError(
                f"{override!r} in the row {word!r} is not an override; write key=value behind the recipe, "
                "and within quotes of its own where it has blanks"
            )
    name = recipe_files.with_overrides(recipe_files.read(recipe), own)["name"]
    if own and "name" not in map(key_of, own):
        name = " ".join([str(name), *own])
    return Asked(str(name), recipe, tuple(own))


def _is_there(word: str) -> bool:
    try:
        return Path(word).exists()
    except OSError:  # longer than a file's name may be, so no file's
        return False


def _split(word: str) -> list[str]:
    try:
        return shlex.split(word)
    except ValueError as error:
        raise UserError(f"the row {word!r} cannot be read ({error}); put quotes in pairs") from None


def _check_names(rows: Sequence[Asked]) -> None:
    taken: dict[str, Asked] = {}
    for row in rows:
        folder = row.folder.casefold()
        if folder == UNTRAINED:
            raise UserError(f"{row.name!r} is the row of the model before training; choose another name=... for yours")
        if len(folder.encode()) > LONGEST_FOLDER:
            raise UserError(
                f"the row {row.name!r} would be called by all its overrides, too long for a directory; give it a "
                'short name, as in "RECIPE key=value name=short"'
            )
        if folder in taken:
            raise UserError(
                f"two rows are called {row.name!r}; leave one out, or give it another name, as in "
                f'"{row.recipe} name=other"'
            )
        taken[folder] = row
