"""A tiny Harmony run on generated scenes, all five objectives, a second or two long."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harmony import recipe as recipes
from harmony.recipe import Recipe
from harmony.training.distributed import Place
from harmony.training.trainer import Trainer

TINY = (
    "model.image={name: vit_tiny_patch16_224, patch: 8, width: 16, depth: 2, heads: 2, drop_path: 0.3}",
    "model.text={width: 16, layers: 1, heads: 2, context: 16}",
    "model.embed=16",
    "data={train: 'scenes:train?count=40', val: null, batch_size: 8, workers: 0}",
    "views.global={size: 32}",
    "views.local={count: 2, size: 16}",
    "objectives.dino={freeze_prototypes: 1 epoch, head: {prototypes: 24, hidden: 16, bottleneck: 8}}",
    "objectives.mae.decoder={width: 16, depth: 1, heads: 2}",
    "objectives.text_distillation={freeze_prototypes: 1 epoch, head: {prototypes: 24, hidden: 16, bottleneck: 8}}",
    "optim={lr: 0.03, warmup: 2 steps}",
    "train={steps: 8, log_every: 1 step, checkpoint_every: 3 steps}",
)

HERE = Place(torch.device("cpu"), rank=0, ranks=1)

# What is proven here is proven on the CPU, wherever the tests run.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

MEASURED_BY_THE_CLOCK = ("examples_per_second", "data_wait", "memory_gib")


def tiny(*overrides: str) -> Recipe:
    return recipes.load("quickstart", [*TINY, *overrides])


def tiny_trainer(*overrides: str) -> Trainer:
    return Trainer(tiny(*overrides), HERE)


def log_of(out: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED_BY_THE_CLOCK} for line in lines]


def weights(tensors: dict[str, torch.Tensor] | Sequence[torch.Tensor]) -> torch.Tensor:
    """All tensors as one flat vector."""
    values = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([value.detach().flatten().double() for value in values])
