"""Evaluation beside what it could be: features against the tower's forward pass alone, and the linear probe's grid.

    python -m benchmarks.evaluation                                     ViT-S/16 from JPEGs, and 40 settings on a CPU
    python -m benchmarks.evaluation features --size 500x375 1600x1200 --arch vit_tiny_patch16_224
    python -m benchmarks.evaluation linear --examples 2000 5000 10000 --classes 100 --width 384
    python -m benchmarks.evaluation features --device cuda --precision bf16 --workers 15 --images 8192 --batch 256

On a CPU without workers what counts is processor time, on a GPU or with workers the clock's; forward pass and
extraction take turns and the fastest round of each is told. Features of the grid are drawn: class means and noise, with
a spectrum that falls as an encoder's does. What all fits take at ImageNet's size is extrapolated from each measured
size in proportion to images and classes.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from torch import Tensor

from benchmarks.loader import Parts
from benchmarks.machine import described, finish
from benchmarks.photographs import write_shard
from benchmarks.telling import refusals, tell
from harmony import recipe as recipes
from harmony.data.sources import open_source
from harmony.evaluation import crops, features, linear
from harmony.evaluation.encoders import TowersEncoder
from harmony.evaluation.features import Features
from harmony.evaluation.linear_data import Inputs, Probed, split
from harmony.evaluation.logistic import Problem
from harmony.evaluation.settings import EvaluationConfig
from harmony.evaluation.store import Store
from harmony.training.trained import drawn_towers

IMAGENET = 1_281_167, 1000
"""Training images, and classes."""

STRENGTHS = tuple(10.0**power for power in range(2, -8, -1))
"""Regularisations of the grid: ten, for each of four kinds of inputs."""


class Extraction:
    """An encoder with random weights over made JPEGs of one size."""

    def __init__(self, overrides: list[str], uri: str, config: EvaluationConfig, device: torch.device) -> None:
        recipe = recipes.load("harmony", [f"data.train={uri}", *overrides])
        self.source, self.config = open_source(uri), config
        self.encoder = TowersEncoder("drawn", drawn_towers(recipe).eval(), recipe, device)
        self.layers = min(features.LAYERS, self.encoder.depth)
        self._by_processor = device.type == "cpu" and config.workers == 0

    def forward(self) -> float:
        """Seconds an image of the tower alone, with the layers whose features are kept, on a tensor that is ready."""
        size, batch = self.encoder.size, min(self.config.batch_size, len(self.source))
        pixels = torch.randn(batch, 3, size, size, device=self.encoder.device)
        made = Features(self.encoder, self.source, self.config)
        start = self._now()
        for _ in range(len(self.source) // batch):
            with made._precision():
                self.encoder.encode(pixels, self.layers)
        return (self._now() - start) / (len(self.source) // batch * batch)

    def extract(self, folder: Path, parts: Parts | None = None) -> float:
        """Seconds an image of features from shards to disk, without what a command does once (hash the weights)."""
        config = self.config.model_copy(update={"features": str(folder)} | ({"workers": 0} if parts else {}))
        made = Features(self.encoder, self.source, config)
        assert made._fingerprint
        with (parts or Parts()).watching(self._parts() if parts else {}):
            start = self._now()
            images = made.images()
            assert not images.bad
            return (self._now() - start) / len(images)

    def once(self) -> float:
        """Seconds that a command takes to hash the weights, which is what features are found again by."""
        start = self._now()
        self.encoder.fingerprint()
        return self._now() - start

    def _parts(self) -> dict[str, list[tuple[Any, str]]]:
        encoder = type(self.encoder)
        return {
            "read": [(type(self.source), "__getitem__")],
            "decode": [(crops, "decode")],
            "resize, cut": [(crops, "evaluation_crop")],
            "normalise": [(encoder, "normalise")],
            "forward": [(encoder, "encode")],
            "keep": [(features, "_kept")],
            "store": [(Store, "_put")],
        }

    def _now(self) -> float:
        finish(self.encoder.device)
        return time.process_time() if self._by_processor else time.perf_counter()


def measure_features(work: Extraction, folder: Path, rounds: int) -> dict[str, Any]:
    """Forward pass and extraction in turn, then the parts of one more extraction, without workers."""
    work.forward()  # the first one fetches memory
    taken = [(work.forward(), work.extract(folder / str(number))) for number in range(rounds)]
    forward, extraction = (min(each) for each in zip(*taken, strict=True))
    parts = Parts()
    whole = 1e3 * work.extract(folder / "parts", parts)
    by_part = {name: 1e3 * spent / len(work.source) for name, spent in parts.seconds.items()}
    return {
        "image_tower": work.encoder.recipe.model.image.name,
        "pixels": work.encoder.size,
        "images": len(work.source),
        "batch": work.config.batch_size,
        "workers": work.config.workers,
        "forward_images_per_s": 1 / forward,
        "extraction_images_per_s": 1 / extraction,
        "of_forward_speed": forward / extraction,
        "milliseconds_by_part": by_part | {"rest": whole - sum(by_part.values())},
        "weights_hashed_once_s": work.once(),
    }


def drawn(examples: int, classes: int, width: int, layers: int = 4, seed: int = 0) -> Probed:
    """Features whose classes overlap, with a spectrum that falls and layers that are rotations of nearly the same."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (examples,), generator=random)
    spectrum = torch.arange(1, width + 1).rsqrt()
    means = 0.3 * torch.randn(classes, width, generator=random)
    hidden = means[labels] + 1.5 * torch.randn(examples, width, generator=random)

    def layer() -> Tensor:
        rotation = torch.linalg.qr(torch.randn(width, width, generator=random)).Q
        return ((hidden + 0.5 * torch.randn(examples, width, generator=random)) * spectrum) @ rotation

    cls = torch.stack([layer() for _ in range(layers)], dim=1)
    return Probed(cls, layer(), labels, torch.arange(examples), 0, 0)


class Watched:
    """What each setting of the grid took, while it is watched."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.settings: list[dict[str, float]] = []
        self.preparing = 0.0
        self.multiplications = 0
        """Pairs of an image's input and a class's weight, over all passes over the data."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        prepare, solve, read = Problem.__init__, Problem.solve, Problem._cross_entropy

        def prepared(problem: Problem, *arguments: Any) -> None:
            start = self.now()
            prepare(problem, *arguments)
            self.preparing += self.now() - start

        def solved(problem: Problem, regularisation: float, *arguments: Any) -> Any:
            start, passes = self.now(), self.passes
            found = solve(problem, regularisation, *arguments)
            self.settings.append(
                {
                    "width": len(problem.mean),
                    "regularisation": regularisation,
                    "iterations": found.steps,
                    "passes": self.passes - passes,
                    "s": self.now() - start,
                }
            )
            return found

        def was_read(problem: Problem, weights: Tensor) -> Any:
            before = problem._last
            found = read(problem, weights)
            if problem._last is not before:
                self.passes += 1
                self.multiplications += len(problem._inputs) * weights.numel()
            return found

        self.passes = 0
        with (
            patch.object(Problem, "__init__", prepared),
            patch.object(Problem, "solve", solved),
            patch.object(Problem, "_cross_entropy", was_read),
        ):
            yield

    def now(self) -> float:
        finish(self.device)
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()


def measure_grid(examples: int, classes: int, width: int, device: torch.device) -> dict[str, Any]:
    """Forty settings fitted and measured as `harmony evaluate --task linear` does, and the best one fitted to all."""
    train = drawn(examples, classes, width)
    kinds = [Inputs(layers, pooling) for layers in (1, 4) for pooling in ("cls", "cls_and_mean")]
    grid = [linear.Tried(kind, value) for kind in kinds for value in STRENGTHS]
    fitted, held_out = split(train.labels, 0.1, 0)
    watched = Watched(device)
    with watched.watching():
        start = watched.now()
        best = linear.best(linear.search(grid, train, fitted, held_out, classes, device))
        searched = watched.now() - start
        preparing, settings = watched.preparing, list(watched.settings)
        Problem(best.inputs.of(train.cls, train.patches).to(device), train.labels, classes).solve(best.value)
        whole = watched.now() - start
    size = IMAGENET[0] * IMAGENET[1] / (examples * classes)
    flops, fits = 4.0 * watched.multiplications, sum(one["s"] for one in watched.settings)
    return {
        "examples": examples,
        "classes": classes,
        "width": width,
        "settings": settings,
        "s": whole,
        "search_s": searched,
        "preparing_s": preparing,
        "fitting_s": sum(one["s"] for one in settings),
        "again_on_all_s": whole - searched,
        "s_per_setting": searched / len(grid),
        "passes_per_setting": sum(one["passes"] for one in settings) / len(grid),
        "flops": flops,
        "flops_per_s": flops / fits,
        "chosen": {"width": len(best.inputs.of(train.cls[:1], train.patches[:1])[0]), "value": best.value},
        "validation_top1": best.validation_top1,
        "imagenet_extrapolated": {"flops": flops * size, "s": fits * size},
    }


def tables(found: dict[str, Any]) -> Group:
    """What was measured, for a terminal."""
    machine = found["machine"]
    where = f"{machine['device']}, {machine['threads']} threads, load {machine['load']}"
    shown: list[Table | str] = [where]
    if found["features"]:
        shown.append(
            _columns("Features: from JPEGs in shards to disk, beside the forward pass alone", found["features"])
        )
    if found["linear"]:
        table = _table("The linear probe's grid, 40 settings")
        names = ("N", "classes", "width", "s", "a setting", "passes", "preparing", "on all", "GFLOP/s")
        for name in (*names, "as ImageNet"):
            table.add_column(name, justify="right")
        for one in found["linear"]:
            seconds = (f"{one[name]:.2f}" for name in ("preparing_s", "again_on_all_s"))
            table.add_row(
                *(f"{one[name]:,}" for name in ("examples", "classes", "width")),
                *(f"{one[name]:.2f}" for name in ("s", "s_per_setting")),
                f"{one['passes_per_setting']:.1f}",
                *seconds,
                f"{one['flops_per_s'] / 1e9:.1f}",
                f"{one['imagenet_extrapolated']['s'] / 60:.0f} min",
            )
        shown += [table, "As ImageNet: all fits, extrapolated in proportion to images and classes."]
    return Group(*shown)


def _columns(title: str, measured: list[dict[str, Any]]) -> Table:
    """A column for each size of the JPEGs."""
    table = _table(title)
    table.add_column("")
    for one in measured:
        table.add_column(one["jpegs"], justify="right")
    table.add_row("forward alone, images/s", *(f"{one['forward_images_per_s']:.2f}" for one in measured))
    table.add_row("extraction, images/s", *(f"{one['extraction_images_per_s']:.2f}" for one in measured))
    table.add_row("of forward's speed", *(f"{100 * one['of_forward_speed']:.1f} %" for one in measured))
    for part in measured[0]["milliseconds_by_part"]:
        table.add_row(f"{part}, ms an image", *(f"{one['milliseconds_by_part'][part]:.2f}" for one in measured))
    return table


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold cyan")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["features", "linear", "all"], default="all")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe harmony, as in model.image.depth=2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--json", type=Path, help="file for the numbers; - for the screen, in place of the tables")
    made = parser.add_argument_group("features")
    made.add_argument("--arch", default="vit_small_patch16_224", help="image tower")
    made.add_argument("--size", nargs="+", default=["500x375", "1600x1200"], help="width x height of the JPEGs")
    made.add_argument("--images", type=int, default=64)
    made.add_argument("--batch", type=int, default=32, help="images encoded at a time")
    made.add_argument("--workers", type=int, default=0, help="processes that read and decode")
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    made.add_argument("--rounds", type=int, default=2)
    grid = parser.add_argument_group("linear")
    grid.add_argument("--examples", type=int, nargs="+", default=[2000, 5000, 10_000], help="training images")
    grid.add_argument("--classes", type=int, default=100)
    grid.add_argument("--width", type=int, default=384, help="of a token; inputs have 1, 2, 4 and 5 of them")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    device = torch.device(asked.device)
    found: dict[str, Any] = {"machine": described(device), "features": [], "linear": []}
    if asked.what != "linear":
        config = EvaluationConfig(batch_size=asked.batch, workers=asked.workers, precision=asked.precision)
        overrides = [f"model.image.name={asked.arch}", *asked.overrides]
        for jpegs in asked.size:
            with tempfile.TemporaryDirectory() as kept:
                width, height = map(int, jpegs.split("x"))
                uri = write_shard(Path(kept), asked.images, (width, height))
                work = Extraction(overrides, uri, config, device)
                found["features"].append({"jpegs": jpegs} | measure_features(work, Path(kept), asked.rounds))
    if asked.what != "features":
        found["linear"] = [measure_grid(count, asked.classes, asked.width, device) for count in asked.examples]
    tell(found, tables(found), asked.json)
    return found


if __name__ == "__main__":
    with refusals():
        main()
