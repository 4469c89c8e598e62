"""What a scene can be made of: shapes, colours, textures and grounds, each with its name and its paint."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")

COLOURS = {
    "red": (220, 48, 52),
    "orange": (245, 134, 32),
    "yellow": (252, 208, 48),
    "green": (52, 158, 78),
    "blue": (40, 98, 222),
    "purple": (128, 58, 190),
    "pink": (246, 130, 178),
    "white": (246, 246, 242),
}

TEXTURES = ("solid", "striped", "dotted", "checked", "marbled")

GROUNDS = {
    "plain": "a plain {} background",
    "gradient": "a {} gradient",
    "clouds": "{} clouds",
    "grass": "{} grass",
    "tiles": "{} tiles",
    "planks": "{} planks",
}
"""Kinds of background, each with the words for one of a given tone."""

TONES = {
    "sand": (226, 205, 168),
    "mint": (168, 216, 192),
    "sky": (164, 204, 236),
    "lavender": (196, 184, 230),
    "grey": (150, 154, 160),
    "brown": (124, 92, 68),
    "olive": (130, 138, 78),
    "navy": (44, 58, 96),
    "teal": (48, 124, 126),
}

CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
"""Names of the classes: what the main object is, index = shape * 8 + colour."""
