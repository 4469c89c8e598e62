"""The weights that a task trained, left in its folder as safetensors."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from harmony import ranks
from harmony.disk import room_explained


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
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with room_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
            save_file(tensors, aside, dict(about or {}))
            aside.chmod(0o644)  # safetensors lets nobody else read its file
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
