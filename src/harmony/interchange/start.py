"""First weights of the towers: from timm, open_clip, a published Harmony checkpoint, a run or a plain file."""

from harmony.models.settings import InitConfig
from harmony.models.towers import Towers


def start_from(towers: Towers, init: str | InitConfig | None) -> None:
    """Load what `init` names into the towers; nothing when it is None."""
