"""Class names for prompts: the data's own, ImageNet's, or those of a file."""

from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES

from harmony.data.sources import Source
from harmony.data.sources.classes import read_classes
from harmony.errors import UserError, unknown

# Two names stand for two classes each in open_clip's list. Equal names would tie, and ties count as wrong, so the first
# word that WordNet has for one of each pair takes its place.
_TOLD_APART = {744: "projectile", 836: "sunglass"}
_NAMED = {"imagenet": tuple(_TOLD_APART.get(place, name) for place, name in enumerate(IMAGENET_CLASSNAMES))}


def load_names(name: str) -> list[str]:
    """The class names of that name, or of that file.

    Raises:
        UserError: there is neither a set nor a file of that name, or the file holds no names.
    """
    if name in _NAMED:
        return list(_NAMED[name])
    if not Path(name).expanduser().is_file():
        known = unknown("class names", name, _NAMED)
        raise UserError(f"{known} (a file with one name a line serves too, but {name!r} is not a file)")
    return read_classes(Path(name).expanduser()).names


def names_for(source: Source, given: str | None) -> list[str]:
    """The names of a source's classes: those `given`, or its own; none where it has none.

    Raises:
        UserError: as `load_names`, or there are more or fewer names than the source has classes.
    """
    own = list(source.class_names or [])
    if given is None:
        return own
    names = load_names(given)
    if own and len(names) != len(own):
        raise UserError(
            f"zero_shot.classes={given} has {len(names)} names, but {source.uri} has {len(own)} classes; give "
            "one name a class, in the order of the labels"
        )
    return names
