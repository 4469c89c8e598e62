"""What is said of a scene: five captions in different words, from the fullest to the shortest.

Two of them tell the ground; the others leave it out, or it would be all that an encoder needs to tell scenes apart.

The class of the main thing ("red circle") is one phrase in each of them.
"""

from collections.abc import Sequence

from harmony.data.scenes.layout import Dice, Ground, Scene, Thing
from harmony.data.scenes.words import CLASSES, GROUNDS, SINGULAR, TEXTURES

_PATTERNS = {
    "solid": "in one colour",
    "striped": "with stripes",
    "dotted": "with dots",
    "checked": "with checks",
    "marbled": "with marbling",
}

_SIDES = {
    "left": (("left of", "to the left of"), "on its left"),
    "right": (("right of", "to the right of"), "on its right"),
    "above": (("above", "over"), "above it"),
    "below": (("below", "under"), "below it"),
}
"""Each side, as said between two things, and as said of the second thing when the first was named before."""


def captions(scene: Scene) -> list[str]:
    """The five captions of a scene."""
    dice = Dice(scene.chance, "captions")
    main, *others = scene.things
    said = [_relations, _ground_first, _listed, _short, _plain]
    return [say(dice, main, others, _on(scene.ground)) for say in said]


def _relations(dice: Dice, main: Thing, others: Sequence[Thing], ground: str) -> str:
    """As in "a large striped red circle left of a small solid blue square and above a small pink star on planks"."""
    related = [f"{_side(dice, main, other)} {_a(f'small {_textured(other)}')}" for other in others]
    return f"{_a(f'large {_textured(main)}')} {' and '.join(related)}".rstrip() + f" on {ground}"


def _ground_first(dice: Dice, main: Thing, others: Sequence[Thing], ground: str) -> str:
    """As in "on mint planks, a big red circle with stripes, and on its right a little blue square in one colour"."""
    size = dice.pick(("large", "big"))
    said = f"on {ground}, {_a(f'{size} {_patterned(main)}')}"
    for other in others:
        side = _SIDES[_direction(other, main)][1]
        size = dice.pick(("small", "little"))
        said += f", and {side} {_a(f'{size} {_patterned(other)}')}"
    return said


def _listed(dice: Dice, main: Thing, others: Sequence[Thing], ground: str) -> str:
    """As in "a picture of a striped red circle, a solid blue square and a dotted pink star"."""
    *before, last = [_a(_textured(thing)) for thing in (main, *others)]
    listed = f"{', '.join(before)} and {last}" if before else f"{last} alone"
    return f"{_pictured(dice)} {listed}"


def _short(dice: Dice, main: Thing, others: Sequence[Thing], ground: str) -> str:
    """As in "a red circle left of a blue square", or the other way round."""
    if not others:
        return f"nothing but {_a(CLASSES[main.label])}"
    first, second = dice.pick(((main, others[0]), (others[0], main)))
    return f"{_a(CLASSES[first.label])} {_side(dice, first, second)} {_a(CLASSES[second.label])}"


def _plain(dice: Dice, main: Thing, others: Sequence[Thing], ground: str) -> str:
    """As in "a picture of a large red circle"."""
    size = dice.pick(("", "large ", "big "))
    return f"{_pictured(dice)} {_a(size + CLASSES[main.label])}"


def _pictured(dice: Dice) -> str:
    return f"{_a(dice.pick(('picture', 'photo', 'image')))} of"


def _on(ground: Ground) -> str:
    words = GROUNDS[ground.kind][0].format(ground.tone)
    return _a(words) if ground.kind in SINGULAR else words


def _textured(thing: Thing) -> str:
    return f"{TEXTURES[thing.texture]} {CLASSES[thing.label]}"


def _patterned(thing: Thing) -> str:
    return f"{CLASSES[thing.label]} {_PATTERNS[TEXTURES[thing.texture]]}"


def _side(dice: Dice, thing: Thing, other: Thing) -> str:
    """Where `thing` is, seen from `other`, in words to stand between them."""
    return dice.pick(_SIDES[_direction(thing, other)][0])


def _direction(thing: Thing, other: Thing) -> str:
    """The side of `other` that `thing` is on, along the axis on which they are further apart."""
    across, down = thing.x - other.x, thing.y - other.y
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
