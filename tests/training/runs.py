"""A tiny Harmony run on generated scenes, all five objectives, a second or two long."""

import json
import os
import subprocess
import sys
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
    "objectives.dino.head={prototypes: 24, hidden: 16, bottleneck: 8}",
    "objectives.mae.decoder={width: 16, depth: 1, heads: 2}",
    "objectives.text_distillation.head={prototypes: 24, hidden: 16, bottleneck: 8}",
    "optim={lr: 0.03, warmup: 2 steps}",
    "train={steps: 8, log_every: 1 step, checkpoint_every: 3 steps}",
)

HERE = Place(torch.device("cpu"), rank=0, ranks=1)

MEASURED_BY_THE_CLOCK = ("examples_per_second", "data_wait", "memory_gib")


def tiny(*overrides: str) -> Recipe:
    return recipes.load("quickstart", [*TINY, *overrides])


def tiny_trainer(*overrides: str) -> Trainer:
    return Trainer(tiny(*overrides), HERE)


def log_of(out: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED_BY_THE_CLOCK} for line in lines]


def start(code: str, *arguments: Any, processes: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Run Python code in a process of its own, as the leader of its own group; or in several ranks under torchrun."""
    launcher = [sys.executable, "-c", code]
    if processes > 1:
        script = Path(arguments[0]).with_suffix(".py")
        script.write_text(code)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher.append(str(script))
    paths = [str(Path(__file__).parent), *sys.path]
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], status: int = 0) -> str:
    """What a process printed, once it has left with the given status."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    return output


def weights(tensors: dict[str, torch.Tensor] | Sequence[torch.Tensor]) -> torch.Tensor:
    """All tensors as one flat vector."""
    values = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([value.detach().flatten().double() for value in values])
