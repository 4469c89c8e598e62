"""Which things stand where in scene number i: the layout, drawn from chance before anything is painted.

Lengths are shares of the picture's side, x to the right and y downwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import torch

from harmony.chance import Chance
from harmony.data.scenes.words import COLOURS, GROUNDS, SHAPES, TEXTURES, TONES

T = TypeVar("T")

REACH = 1.2
"""How far a shape may reach from its centre, in units of its radius."""

CONTRAST = 85
"""Least distance of the ground's tone from the colour of every thing, in red, green and blue of 255."""

_TRIES = 16

SplitName = Literal["train", "val", "held_out"]
SPLITS: dict[SplitName, int] = {"train": 0, "val": 1, "held_out": 2}

Combination = tuple[int, int, int]
"""Indices of a shape, a colour and a texture."""


def is_held_out(combination: Combination) -> bool:
    """Whether things of this shape, colour and texture are kept for the held-out split.

    One texture in five of every shape and colour is, chosen so that each pair of shape and colour, shape and texture,
    and colour and texture is still seen in training.
    """
    shape, colour, texture = combination
    return (shape + 2 * colour) % len(TEXTURES) == texture


COMBINATIONS: tuple[Combination, ...] = tuple(
    (shape, colour, texture)
    for shape in range(len(SHAPES))
    for colour in range(len(COLOURS))
    for texture in range(len(TEXTURES))
)
SEEN = tuple(combination for combination in COMBINATIONS if not is_held_out(combination))
HELD_OUT = tuple(combination for combination in COMBINATIONS if is_held_out(combination))


@dataclass(frozen=True)
class Thing:
    """One coloured shape: indices of its shape, colour and texture, centre, radius, and its turn in radians."""

    shape: int
    colour: int
    texture: int
    x: float
    y: float
    radius: float
    turn: float
    grain: float
    """In [0, 1), where the texture starts and how it runs."""

    @property
    def label(self) -> int:
        """Class index: what the thing is, without its texture."""
        return self.shape * len(COLOURS) + self.colour


@dataclass(frozen=True)
class Ground:
    """The background: the names of its kind and tone, and the direction of its light in radians."""

    kind: str
    tone: str
    direction: float


@dataclass(frozen=True)
class Scene:
    """Things on a ground; the first thing is the main and largest one. `chance` is the scene's own stream."""

    things: tuple[Thing, ...]
    ground: Ground
    chance: Chance


class Dice:
    """Picks, one after the other, from the uniform numbers of one example's stream."""

    def __init__(self, chance: Chance, name: str, count: int = 96) -> None:
        self._numbers = iter(chance.uniform(name, count)[0].tolist())

    def between(self, low: float, high: float) -> float:
        return low + next(self._numbers) * (high - low)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(next(self._numbers) * len(options))]


def scene(seed: int, split: SplitName, i: int) -> Scene:
    """Scene number i of a split."""
    chance = Chance.of_examples(seed, SPLITS[split], torch.tensor([i]))
    dice = Dice(chance, "layout")
    main = _main_thing(dice, _combination(seed, split, i))
    things = [main]
    for _ in range(dice.pick((0, 1, 1, 2, 2))):
        # Small things avoid what the main one is, so that "the red circle" is never two things.
        other = dice.pick(_others(main.shape, main.colour))
        placed = _small_thing(dice, other, things)
        if placed is not None:
            things.append(placed)
    return Scene(tuple(things), _ground(dice, things), chance)


def _combination(seed: int, split: SplitName, i: int) -> Combination:
    """What the main thing is: the combinations take turns, in a new order each round, so all are equally frequent."""
    options = HELD_OUT if split == "held_out" else SEEN
    turn, place = divmod(i, len(options))
    return options[_order(seed, SPLITS[split], turn, len(options))[place]]


@lru_cache(maxsize=64)
def _order(seed: int, split: int, turn: int, count: int) -> tuple[int, ...]:
    return tuple(Chance.of_examples(seed, split, torch.tensor([turn])).permutation("combinations", count)[0].tolist())


@lru_cache(maxsize=64)
def _others(shape: int, colour: int) -> tuple[Combination, ...]:
    return tuple(other for other in SEEN if other[0] != shape or other[1] != colour)


def _main_thing(dice: Dice, combination: Combination) -> Thing:
    radius = dice.between(0.21, 0.29)
    x, y = _inside(dice, radius)
    return Thing(*combination, x, y, radius, dice.between(-0.3, 0.3), dice.between(0, 1))


def _small_thing(dice: Dice, combination: Combination, others: Sequence[Thing]) -> Thing | None:
    """A small thing at the first free place of a few tried; None when each of them would touch another thing."""
    radius = dice.between(0.10, 0.135)
    places = [_inside(dice, radius) for _ in range(_TRIES)]
    turn, grain = dice.between(-0.3, 0.3), dice.between(0, 1)
    for x, y in places:
        if all(math.dist((x, y), (other.x, other.y)) > REACH * (radius + other.radius) for other in others):
            return Thing(*combination, x, y, radius, turn, grain)
    return None


def _inside(dice: Dice, radius: float) -> tuple[float, float]:
    """A place where a thing of this radius lies wholly in the picture."""
    return dice.between(REACH * radius, 1 - REACH * radius), dice.between(REACH * radius, 1 - REACH * radius)


def _ground(dice: Dice, things: Sequence[Thing]) -> Ground:
    """A ground whose tone stands off from the colours of all things."""
    colours = [list(COLOURS.values())[thing.colour][0] for thing in things]
    kind = dice.pick(tuple(GROUNDS))
    clear = [tone for tone in GROUNDS[kind][1] if all(math.dist(TONES[tone], colour) > CONTRAST for colour in colours)]
    return Ground(kind, dice.pick(clear), dice.between(0, 2 * math.pi))
