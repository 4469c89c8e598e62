"""`loader`: what the data path makes of JPEGs a second and a core, and whether all cores feed the device."""

from functools import partial

import torch

from benchmarks.loader import WAYS, Bench, measure
from benchmarks.photographs import write_shard
from benchmarks.visit.running import Found, Setting, Stage, Task
from harmony import recipe as recipes
from harmony.data.sources import open_source

SIZE, IMAGES, BATCH = (500, 375), 384, 96
TINY_SIZE, TINY_IMAGES, TINY_BATCH = (90, 70), 8, 4
TINY = ("views.global.size=32", "views.local.size=16", "views.local.count=2", "model.image.name=vit_tiny_patch16_224")

WANTED = (500.0, 1000.0, 2000.0, 4000.0, 100_000.0)
"""Pairs a second that the consumer takes; the last is as many as there are."""


def tasks(setting: Setting) -> Stage:
    """By part on one core; then all workers feeding a consumer; options are settings of the recipe."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have it
    bench: list[Bench] = []
    try:
        yield Task("JPEGs are made", partial(_made, setting, bench), 30)
        if not bench:
            return
        yield Task("one core, by part", partial(_by_part, setting, bench[0]), 90)
        for wanted in WANTED[-1:] if setting.tiny else reversed(WANTED):
            for way in WAYS[1:]:
                name = f"{setting.workers} workers, {way}, {wanted:.0f} pairs/s"
                yield Task(name, partial(_fed, setting, bench[0], way, wanted), 40)
    finally:
        torch.set_num_threads(threads)


def _made(setting: Setting, bench: list[Bench]) -> Found:
    """Noise and scenes with the cost of photographs, once for all visits that find them again."""
    size, count, batch = (TINY_SIZE, TINY_IMAGES, TINY_BATCH) if setting.tiny else (SIZE, IMAGES, BATCH)
    uri = write_shard(setting.keep / "photographs", count, size)
    recipe = recipes.load("harmony", [f"data.train={uri}", *setting.options, *(TINY if setting.tiny else ())])
    bench.append(Bench(recipe, open_source(uri), batch, setting.device))
    return {"images": count, "size": list(size), "batch": batch}


def _by_part(setting: Setting, bench: Bench) -> Found:
    found = measure(bench, 1 if setting.tiny else 3)
    rates = {way: one["images_per_second_per_core"] for way, one in found["ways"].items()}
    times = {way: one["times_plain"] for way, one in found["ways"].items()}
    return {
        "images_per_second_per_core": rates,
        "times_plain": times,
        "device_milliseconds": found["device_milliseconds"],
        "details": found,
    }


def _fed(setting: Setting, bench: Bench, way: str, wanted: float) -> Found:
    steps = 2 if setting.tiny else int(min(120, max(30, 6 * wanted / bench.batch)))
    return bench.fed(way, setting.workers, wanted, steps)
