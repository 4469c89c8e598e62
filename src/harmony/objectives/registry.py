"""The kinds of objectives, by the name a recipe uses."""

from harmony.objectives.base import Objective
from harmony.objectives.beit import Beit
from harmony.objectives.clip import Clip
from harmony.objectives.densecl import Densecl
from harmony.objectives.detailclip import DetailClip
from harmony.objectives.dino import Dino
from harmony.objectives.filip import Filip
from harmony.objectives.ibot import Ibot
from harmony.objectives.ijepa import Ijepa
from harmony.objectives.koleo import Koleo
from harmony.objectives.mae import Mae
from harmony.objectives.masked_distillation import MaskedDistillation
from harmony.objectives.mlm import Mlm
from harmony.objectives.mocov3 import Mocov3
from harmony.objectives.siglip import Siglip
from harmony.objectives.simclr import Simclr
from harmony.objectives.supcon import Supcon
from harmony.objectives.swav import Swav
from harmony.objectives.text_distillation import TextDistillation
from harmony.objectives.vicreg import Vicreg

_KINDS: dict[str, type[Objective]] = {
    "beit": Beit,
    "clip": Clip,
    "densecl": Densecl,
    "detailclip": DetailClip,
    "dino": Dino,
    "filip": Filip,
    "ibot": Ibot,
    "koleo": Koleo,
    "ijepa": Ijepa,
    "mae": Mae,
    "masked_distillation": MaskedDistillation,
    "mlm": Mlm,
    "mocov3": Mocov3,
    "siglip": Siglip,
    "simclr": Simclr,
    "supcon": Supcon,
    "swav": Swav,
    "text_distillation": TextDistillation,
    "vicreg": Vicreg,
}


def kinds() -> dict[str, type[Objective]]:
    """Name -> class of every kind of objective."""
    return dict(_KINDS)
