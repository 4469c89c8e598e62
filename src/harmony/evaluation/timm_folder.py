"""A fine-tuned model as files that timm loads by itself.

    timm.create_model("local-dir:FOLDER", pretrained=True)

`model.safetensors` holds the weights, `config.json` the architecture, its sizes, the preprocessing and the class names.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn

from harmony.disk import room_explained
from harmony.evaluation.encoder import Encoder

FILES = ("model.safetensors", "config.json")


def write_timm_folder(folder: Path, model: nn.Module, encoder: Encoder, size: int, names: Sequence[str]) -> None:
    """Write the model's files into `folder`, each in place of an earlier one.

    Args:
        folder: made if missing.
        model: a timm classifier.
        encoder: whose mean and standard deviation its inputs are normalised with.
        size: side in px of its inputs.
        names: of its classes.

    Raises:
        UserError: the disk has no room.
    """
    preprocessing: dict[str, Any] = {
        "input_size": (3, size, size),
        "mean": encoder.mean,
        "std": encoder.std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    # A class of our own that computes what timm's block does; JSON cannot hold it, and timm's own loads the weights.
    changes = {"block_fn": None} if "block_fn" in getattr(model, "_model_args", {}) else {}
    with room_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".model-", dir=folder))
        try:
            save_for_hf(
                model,
                str(aside),
                model_config={"pretrained_cfg": preprocessing, "label_names": list(names)},
                model_args=changes,
                safe_serialization=True,
            )
            for name in FILES:
                (aside / name).replace(folder / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
