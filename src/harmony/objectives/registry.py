"""The kinds of objectives, by the name a recipe uses."""

from harmony.objectives.base import Objective
from harmony.objectives.clip import Clip
from harmony.objectives.detailclip import DetailClip
from harmony.objectives.dino import Dino
from harmony.objectives.filip import Filip
from harmony.objectives.ibot import Ibot
from harmony.objectives.ijepa import Ijepa
from harmony.objectives.mae import Mae
from harmony.objectives.mlm import Mlm
from harmony.objectives.siglip import Siglip
from harmony.objectives.text_distillation import TextDistillation

_KINDS: dict[str, type[Objective]] = {
    "clip": Clip,
    "detailclip": DetailClip,
    "dino": Dino,
    "filip": Filip,
    "ibot": Ibot,
    "ijepa": Ijepa,
    "mae": Mae,
    "mlm": Mlm,
    "siglip": Siglip,
    "text_distillation": TextDistillation,
}


def kinds() -> dict[str, type[Objective]]:
    """Name -> class of every kind of objective."""
    return dict(_KINDS)
