"""Run directories as training leaves them, without the training: made in a moment, of untrained towers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from harmony import recipe as recipes
from harmony.recipe import Recipe
from harmony.training import checkpoints
from harmony.training.checkpoints import State
from harmony.training.learner import Learner, build_learner

TINY = (
    "model.image={name: vit_tiny_patch16_224, patch: 8, width: 16, depth: 2, heads: 2, drop_path: 0.0}",
    "model.text={width: 16, layers: 1, heads: 2, context: 24}",
    "model.embed=16",
    "data={train: 'scenes:train?count=64', val: 'scenes:val?count=24', batch_size: 8, workers: 0}",
    "views.global={size: 32}",
    "views.local={count: 2, size: 16}",
    "objectives.dino.head={prototypes: 24, hidden: 16, bottleneck: 8}",
    "objectives.mae.decoder={width: 16, depth: 1, heads: 2}",
    "objectives.text_distillation.head={prototypes: 24, hidden: 16, bottleneck: 8}",
    "optim.warmup=10%",
    "train={steps: 200, precision: fp32}",
    "evaluation={workers: 0, batch_size: 16}",
)


@dataclass
class SavedRun:
    folder: Path
    checkpoint: Path
    recipe: Recipe
    learner: Learner


def tiny_recipe(*overrides: str) -> Recipe:
    return recipes.load("quickstart", [*TINY, *overrides])


def saved_run(folder: Path, recipe: Recipe) -> SavedRun:
    """A run with one checkpoint, in which student and teacher differ, and nothing else."""
    torch.manual_seed(recipe.train.seed)
    learner = build_learner(recipe)
    with torch.no_grad():
        for parameter in learner.student.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    state = State(step=3, steps=200, epoch_steps=8, examples=24)
    state.data = {"uri": recipe.data.train, "examples": 64, "fingerprint": "test"}
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(folder / "recipe.yaml")
    checkpoint = checkpoints.save(folder / "checkpoints", learner.state_dict(), {}, state, recipe.to_yaml(), keep=3)
    return SavedRun(folder, checkpoint, recipe, learner)


def write_log(run: SavedRun, lines: int = 40) -> None:
    """A log with everything that training logs, of a run that goes well."""
    with (run.folder / "log.jsonl").open("w", encoding="utf-8") as file:
        for place in range(1, lines + 1):
            fall = math.exp(-4 * place / lines)
            line: dict[str, float | None] = {"step": 5 * place, "epoch": 5 * place / 8, "examples": 40 * place}
            for i, name in enumerate(run.recipe.objectives):
                line |= {f"loss/{name}": 1 + i * fall, f"weight/{name}": 1.0, f"grad_norm/{name}": 0.1 + fall}
                line |= {f"sign/{name}/target_entropy": 1 + fall, f"sign/{name}/prototype_use": 1 - fall / 2}
            line |= {"loss": 5 + fall, "grad_norm": 1 + fall, "grad_norm/image": 0.5, "grad_norm/text": None}
            line |= {"lr": 1e-3 * fall, "weight_decay": 0.05, "teacher_momentum": 1 - 0.02 * fall, "temperature": 0.07}
            line |= {"sign/student_image/rank": 9 - 8 * fall, "sign/teacher_image/rank": 9 - 6 * fall}
            line |= {"skipped_steps": 0, "examples_per_second": 80.0, "data_wait": 0.02, "memory_gib": 1.5}
            file.write(json.dumps(line) + "\n")
