"""What a scene can be made of: shapes, colours, textures and grounds, each with its name and its paint."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")

COLOURS = {
    "red": ((218, 46, 52), (255, 205, 200)),
    "orange": ((244, 130, 28), (255, 226, 186)),
    "yellow": ((252, 206, 40), (255, 246, 205)),
    "green": ((46, 156, 76), (200, 240, 196)),
    "blue": ((38, 96, 222), (190, 218, 255)),
    "purple": ((126, 56, 188), (222, 200, 250)),
    "pink": ((244, 122, 174), (255, 228, 238)),
    "white": ((247, 247, 244), (164, 172, 186)),
}
"""Each colour and the second one of its textures, red, green and blue of 255."""

TEXTURES = ("solid", "striped", "dotted", "checked", "marbled")

TONES = {
    "sand": (228, 208, 172),
    "mint": (170, 218, 196),
    "sky": (166, 206, 238),
    "lavender": (198, 186, 232),
    "grey": (150, 154, 162),
    "brown": (126, 94, 70),
    "olive": (132, 140, 78),
    "navy": (46, 60, 100),
    "teal": (50, 126, 128),
}

GROUNDS = {
    "plain": ("plain {} background", tuple(TONES)),
    "gradient": ("{} gradient", tuple(TONES)),
    "clouds": ("{} clouds", ("sand", "mint", "sky", "lavender", "grey")),
    "grass": ("{} grass", ("sand", "mint", "olive", "teal")),
    "tiles": ("{} tiles", tuple(TONES)),
    "planks": ("{} planks", tuple(TONES)),
}
"""Kinds of background: the words for one of a given tone, and the tones that become it."""

SINGULAR = ("plain", "gradient")
"""Kinds of background that take an article."""

CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
"""Names of the classes: what the main object is, index = shape * 8 + colour."""
