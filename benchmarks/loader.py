"""Images a second a core from tar shards to crops on the device, against the published loader's way, and by part.

    python -m benchmarks.loader                                  Harmony's ten crops from JPEGs of 500 x 375 px
    python -m benchmarks.loader --size 2000x1500 --images 48     larger photographs
    python -m benchmarks.loader --data "shards:.../train-*.tar" --recipe clip
    python -m benchmarks.loader --workers 15 --device cuda --consume 500 2000

Each way makes the same batches in turn, round after round, with one thread; what counts is processor time, of which
each way's fastest round is told, because other processes can only slow a round down. The last table lets worker
processes feed a consumer that takes a given number of pairs a second, as a model would, and tells its share of waiting.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.photographs import write_shard
from benchmarks.plain_loader import PlainLoader
from benchmarks.telling import refusals
from harmony import recipe as recipes
from harmony.data import maker
from harmony.data.captions import Tokenizer
from harmony.data.cutting import Cutter
from harmony.data.decode import Opened
from harmony.data.loader import PairLoader
from harmony.data.masks import MaskSampler
from harmony.data.photometric import augment
from harmony.data.settings import DataConfig
from harmony.data.sources import open_source
from harmony.data.sources.base import Source
from harmony.recipe import Recipe
from harmony.training.learner import build_learner

WAYS = ("plain", "worker", "device")
"""The published loader's way; ours with colours changed in the worker; ours with colours left to the device."""


class Parts:
    """Processor seconds spent in named functions, while they are watched."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def watching(self, functions: dict[str, list[tuple[Any, str]]]) -> Iterator[None]:
        """Time the named functions, each an attribute of a module or class; none may call another."""
        with ExitStack() as stack:
            for part, places in functions.items():
                for owner, name in places:
                    stack.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name))))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[part] += time.process_time() - start

        return timed


class Bench:
    """One recipe's loaders over one source."""

    def __init__(self, recipe: Recipe, source: Source, batch: int, device: torch.device) -> None:
        self.recipe, self.source, self.batch, self.device = recipe, source, batch, device
        with torch.device("meta"):
            learner = build_learner(recipe)
        self.views = {name: view for name, view in recipe.views.items() if name in learner.views()}
        self.masks: dict[str, MaskSampler] = learner.masks()
        self.patch_size = learner.student.image.patch
        text = recipe.model.text
        self.tokenizer = Tokenizer(text.context, text.truncation) if text else None
        self.steps = len(source) // batch
        image = recipe.model.image
        self.plain = PlainLoader(source, self.views, self.tokenizer or Tokenizer(), image.mean, image.std)

    def loader(self, way: str, workers: int = 0, steps: int | None = None) -> PairLoader:
        image = self.recipe.model.image
        return PairLoader(
            self.source,
            DataConfig(batch_size=self.batch, workers=workers, max_pixels=self.recipe.data.max_pixels),
            self.views,
            self.tokenizer,
            self.masks,
            self.patch_size,
            image.mean,
            image.std,
            seed=0,
            steps=steps or self.steps,
            augment="worker" if way == "worker" else "device",
            device=self.device,
        )

    def round(self, way: str, parts: Parts | None = None) -> float:
        """Processor seconds an image of one way over the whole source."""
        start = time.process_time()
        if way == "plain":
            order = list(range(len(self.source)))
            random.shuffle(order)
            for step in range(self.steps):
                self.plain.batch(order[step * self.batch : (step + 1) * self.batch])
        else:
            with (parts or Parts()).watching(self.parts() if parts else {}):
                for _ in self.loader(way).batches():
                    pass
        return (time.process_time() - start) / (self.steps * self.batch)

    def parts(self) -> dict[str, list[tuple[Any, str]]]:
        samplers = {type(sampler) for sampler in self.masks.values()}
        return {
            "read": [(type(self.source), "__getitem__")],
            "decode": [(Opened, "__init__"), (Opened, "pixels")],
            "boxes": [(Cutter, "__init__"), (Cutter, "place")],
            "crops": [(Cutter, "cut")],
            "captions": [(Tokenizer, "encode")],
            "masks": [(sampler, "draw") for sampler in samplers],
            "colours drawn": [(maker, "draw_photometric")],
            "colours changed": [(maker, "augment")],
        }

    def on_device(self, rounds: int) -> float:
        """Seconds an image that the device takes to change the colours of one batch, the fastest of some rounds."""
        batch = next(self.loader("device").batches()).to(self.device)
        image = self.recipe.model.image
        taken = []
        for _ in range(rounds):
            start = self._now()
            augment(batch, self.views, image.mean, image.std)
            taken.append(self._now() - start)
        return min(taken) / self.batch

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def fed(self, way: str, workers: int, pairs_a_second: float, steps: int) -> dict[str, Any]:
        """How a consumer of so many pairs a second is fed by worker processes: its pairs and share of waiting."""
        image = self.recipe.model.image
        batches = self.loader(way, workers, steps + 1).batches()
        busy = self.batch / pairs_a_second
        next(batches)  # workers have started
        waited, start = 0.0, self._now()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            begun = time.perf_counter()
            batch = batch.to(self.device)
            if way == "device" and self.device.type != "cpu":
                augment(batch, self.views, image.mean, image.std)
                self._now()
            time.sleep(max(0.0, busy - (time.perf_counter() - begun)))
        seconds = self._now() - start
        batches.close()
        return {
            "way": way,
            "workers": workers,
            "wanted": pairs_a_second,
            "pairs_per_second": steps * self.batch / seconds,
            "waiting": waited / seconds,
        }


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """All ways in turn, `rounds` times; then once more with the clock on every part."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            seconds[way].append(bench.round(way))
    result: dict[str, Any] = {"ways": {}}
    for way, taken in seconds.items():
        result["ways"][way] = {
            "images_per_second_per_core": 1 / min(taken),
            "median_images_per_second_per_core": 1 / statistics.median(taken),
            "times_plain": min(seconds["plain"]) / min(taken),
        }
    for way in WAYS[1:]:
        parts = Parts()
        total = bench.round(way, parts)
        count = bench.steps * bench.batch
        by_part = {part: 1000 * spent / count for part, spent in parts.seconds.items()}
        result["ways"][way]["milliseconds_by_part"] = by_part | {"rest": 1000 * total - sum(by_part.values())}
    result["device_milliseconds"] = 1000 * bench.on_device(rounds)
    return result


def table(result: dict[str, Any]) -> str:
    lines = ["| way | images/s/core | median | times plain | ms an image by part |", "| --- | --- | --- | --- | --- |"]
    for way, found in result["ways"].items():
        parts = ", ".join(f"{part} {spent:.2f}" for part, spent in found.get("milliseconds_by_part", {}).items())
        lines.append(
            f"| {way} | {found['images_per_second_per_core']:.1f} | {found['median_images_per_second_per_core']:.1f} "
            f"| {found['times_plain']:.2f} | {parts or '-'} |"
        )
    lines.append(f"\nColours changed on {result['device']}: {result['device_milliseconds']:.2f} ms an image.")
    if result.get("fed"):
        lines += ["", "| way | workers | pairs/s wanted | pairs/s | waiting |", "| --- | --- | --- | --- | --- |"]
        for one in result["fed"]:
            pairs = f"{one['wanted']:g} | {one['pairs_per_second']:.0f}"
            lines.append(f"| {one['way']} | {one['workers']} | {pairs} | {one['waiting']:.0%} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, as in views.local.count=4")
    parser.add_argument("--recipe", default="harmony")
    parser.add_argument("--data", help="URI of image-caption pairs; without it, JPEGs are made")
    parser.add_argument("--size", default="500x375", help="width x height of the JPEGs made")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs made")
    parser.add_argument("--images", type=int, default=192, help="how many are made")
    parser.add_argument("--folder", type=Path, help="where they are kept; without it they are made anew each time")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that feed the consumer")
    parser.add_argument("--consume", type=float, nargs="*", default=[], help="pairs a second the consumer takes")
    parser.add_argument("--steps", type=int, default=20, help="batches it takes")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        width, height = map(int, asked.size.split("x"))
        uri = asked.data or write_shard(asked.folder or Path(made), asked.images, (width, height), asked.quality)
        recipe = recipes.load(asked.recipe, [f"data.train={uri}", *asked.overrides])
        source = open_source(uri)
        bench = Bench(recipe, source, asked.batch, torch.device(asked.device))
        first = [
            len(image) for image in (source[i].image for i in range(min(50, len(source)))) if isinstance(image, bytes)
        ]
        result = {
            "recipe": recipe.name,
            "data": asked.data or f"made, {asked.size}",
            "kilobytes": statistics.mean(first) / 1000,
            "images": len(source),
            "batch": asked.batch,
            "crops": {name: [view.count, view.size] for name, view in bench.views.items()},
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "device": asked.device,
        } | measure(bench, asked.rounds)
        result["fed"] = [bench.fed(way, asked.workers, rate, asked.steps) for rate in asked.consume for way in WAYS[1:]]
    print(table(result))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    with refusals():
        main()
