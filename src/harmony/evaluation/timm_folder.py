"""A fine-tuned model as files that timm loads by itself.

    timm.create_model("local-dir:FOLDER", pretrained=True)

`model.safetensors` holds the weights, `config.json` the architecture, its sizes, the preprocessing and the class names.
"""

import json
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
    # What timm's own configuration says of its own weights does not hold for these.
    described: dict[str, Any] = {
        "tag": "fine_tuned",
        "license": None,
        "input_size": (3, size, size),
        "mean": encoder.mean,
        "std": encoder.std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    with room_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".model-", dir=folder))
        try:
            save_for_hf(
                model,
                str(aside),
                model_config={"pretrained_cfg": described, "label_names": list(names)},
                model_args={"block_fn": None},
                safe_serialization=True,
            )
            _without_nulls(aside / FILES[1])
            # safetensors lets nobody else read its file; whoever may read the other may read it, too.
            (aside / FILES[0]).chmod((aside / FILES[1]).stat().st_mode)
            for name in FILES:
                (aside / name).replace(folder / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _without_nulls(config: Path) -> None:
    """Leave out the arguments that are None.

    Our towers have blocks of a class of their own, which JSON cannot hold; timm's own takes the same weights and
    computes the same.
    """
    written = json.loads(config.read_text(encoding="utf-8"))
    written["model_args"] = {key: value for key, value in written["model_args"].items() if value is not None}
    config.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
