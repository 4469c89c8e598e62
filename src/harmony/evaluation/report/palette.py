"""A colour for every class, the same wherever the class is drawn."""

import colorsys

_FIRST = (
    (66, 133, 214),
    (232, 145, 28),
    (42, 157, 111),
    (214, 76, 72),
    (140, 103, 204),
    (61, 189, 196),
    (219, 110, 168),
    (166, 181, 56),
    (146, 104, 74),
    (96, 110, 132),
    (242, 196, 72),
    (38, 98, 118),
)
_GOLDEN = 0.6180339887498949
_LIGHT = (0.56, 0.42, 0.70)
_STRONG = (0.60, 0.75, 0.50)


def colour(index: int) -> tuple[int, int, int]:
    """Red, green and blue (0 .. 255) of a class: chosen by hand at first, then hues a golden angle apart."""
    if index < len(_FIRST):
        return _FIRST[index]
    shade = index % len(_LIGHT)
    red, green, blue = colorsys.hls_to_rgb(index * _GOLDEN % 1.0, _LIGHT[shade], _STRONG[shade])
    return round(255 * red), round(255 * green), round(255 * blue)


def css(index: int) -> str:
    """The colour of a class as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour(index))


def is_light(index: int) -> bool:
    """Whether dark letters are easier to read on a class's colour than light ones (by its luma, ITU-R BT.601)."""
    red, green, blue = colour(index)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 150
