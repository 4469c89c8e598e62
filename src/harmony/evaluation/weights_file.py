"""The weights that a task trained, left in its folder as safetensors."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from harmony import ranks
from harmony.disk import whole


def save_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write `path`, all of it or nothing, on the first rank.

    Args:
        path: its folder is made if missing.
        weights: by name.
        about: what else the file says, as its metadata.

    Raises:
        UserError: the disk has no room.
    """
    if not ranks.is_main():
        return
    with whole(path) as aside:
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(tensors, aside, dict(about or {}))
        aside.chmod(0o644)  # safetensors lets nobody else read its file
