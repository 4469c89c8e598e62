"""A comparison for seconds: one row with texts and one of images alone, two seeds, four steps."""

import json
from pathlib import Path
from typing import Any

IMAGES = (
    "quickstart name=images model.text=null objectives.clip=null objectives.mae=null objectives.mlm=null "
    "objectives.text_distillation=null"
)
ROWS = ("clip-small", IMAGES)

SHARED = (
    "model.image={name: vit_tiny_patch16_224, patch: 8, width: 16, depth: 2, heads: 2, drop_path: 0.0}",
    "model.text={width: 16, layers: 1, heads: 2, context: 24}",
    "model.embed=16",
    "data={train: 'scenes:train?count=48&size=32', val: 'scenes:held_out?count=24&size=32', batch_size: 8, workers: 0}",
    "views.global.size=32",
    "views.local={count: 2, size: 16}",
    "objectives.dino.head={prototypes: 24, hidden: 16, bottleneck: 8}",
    "optim.warmup=1 step",
    "train={steps: 4, checkpoint_every: 2 steps, log_every: 4 steps, precision: fp32}",
    "evaluation={workers: 0, linear: {layers: 1, pooling: cls, regularisation: 1.0}}",
)


def comparison(out: Path | str) -> dict[str, Any]:
    """What compare.json says."""
    return json.loads((Path(out) / "compare.json").read_text(encoding="utf-8"))


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in found["rows"] if row["name"] == name)
