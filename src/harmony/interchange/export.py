"""Trained towers handed to other libraries: a new folder in a form that each of them loads by itself.

timm            the image tower
open_clip       both towers
huggingface     the image tower, for transformers
onnx            the image tower, for any runtime

A folder is written aside and renamed, so it is whole or not there.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from harmony.disk import room_explained
from harmony.errors import UserError, unknown
from harmony.models.settings import ModelConfig
from harmony.models.towers import Towers

Written = Mapping[str, Any]
"""Contents of a folder: file name -> tensors by name (safetensors), plain values (JSON), or what writes the file."""


@dataclass(frozen=True)
class Exported:
    """What is handed on.

    Attributes:
        name: what messages call it.
        towers: on the CPU.
        model: the settings they were built with.
        contrast: learned `logit_scale` and `logit_bias` of an objective that compares images with captions, if any.
    """

    name: str
    towers: Towers
    model: ModelConfig
    contrast: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Side in px of the images that the learned positions are for."""
        side: int = self.towers.image.trunk.patch_embed.img_size[0]
        return side


def formats() -> dict[str, Callable[[Exported], Written]]:
    """What `--to` may say, and what makes the contents of such a folder."""
    from harmony.interchange import export_huggingface, export_onnx, export_open_clip, export_timm

    return {
        "timm": export_timm.written,
        "open_clip": export_open_clip.written,
        "huggingface": export_huggingface.written,
        "onnx": export_onnx.written,
    }


def export(what: Exported, to: str, out: Path) -> Path:
    """Write the towers to the new folder `out` in the form of another library.

    Raises:
        UserError: the form is unknown or cannot express the model, a package is missing, `out` exists, or there is no
            room on the disk. Nothing is left behind.
    """
    check(to, out)
    what.towers.eval().requires_grad_(False)
    contents = formats()[to](what)
    aside = out.parent / f".aside-{out.name}-{os.getpid()}"
    try:
        with room_explained(out):
            aside.mkdir(parents=True)
            for name, content in contents.items():
                _write(aside / name, content)
            check(to, out)
            aside.rename(out)
    except PermissionError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}); choose another --out") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def check(to: str, out: Path) -> None:
    """Raise UserError for a form that is not known, and for a folder that exists."""
    if to not in formats():
        raise unknown("format", to, formats())
    if out.exists():
        raise UserError(f"{out} exists; choose another --out, since an export makes a folder of its own")


def _write(path: Path, content: Any) -> None:
    if path.suffix == ".safetensors":
        save_file(
            {name: value.detach().contiguous().clone() for name, value in content.items()}, path, {"format": "pt"}
        )
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read its file
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        content(path)
