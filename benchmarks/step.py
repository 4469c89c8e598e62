"""The training step of a recipe on random tensors: time, utilisation, memory, parts, and when the host must wait.

    python -m benchmarks.step                                        Harmony, ViT-S/16, batch 8, fp32, on this machine
    python -m benchmarks.step clip --arch vit_base_patch16_224 --batch 96 --precision bf16 --profile 20
    python -m benchmarks.step harmony efficiency.checkpointing=blocks --json blocks.json

No data are loaded: a batch of random pixels and words lies on the device, and masks are drawn as the recipe says before
the clock starts. The memory of a CPU is the largest that the process was, so one process measures one step.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import meetings
from benchmarks.machine import described, finish, matmul_rate, resident_gib, vendors_peak
from benchmarks.stopwatch import Stopwatch
from benchmarks.telling import refusals, tell
from harmony import recipe as recipes
from harmony.data.batch import Batch
from harmony.recipe import Recipe
from harmony.schedules import Clock
from harmony.training.cost import flops_of_a_pair
from harmony.training.diagnostics import memory_gib
from harmony.training.learner import build_learner
from harmony.training.process import GarbageByHand, give_back_large_blocks, repeatable
from harmony.training.rehearsal import without_pixels
from harmony.training.resuming import without_init
from harmony.training.step import Stepper

BATCHES = 4
"""Batches that take turns: their masks differ, as those of a run do."""

MIDDLE = Clock(step=5000, steps=10_000, epoch_steps=400)
"""The place in the run: nothing is frozen any more."""

_FIRST_WORD, _LAST_WORD = 1, 49405


@dataclass(frozen=True)
class Work:
    """A recipe that is ready to be stepped.

    Attributes:
        recipe: its colours are not changed on the device, and its first weights are random.
        stepper: what makes the step.
        batches: the batches that take turns.
        device: where all of it lies.
    """

    recipe: Recipe
    stepper: Stepper
    batches: list[Batch]
    device: torch.device

    def autocast(self) -> torch.autocast:
        """The recipe's precision, for a step of another make."""
        dtype = self.stepper.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def step(self, number: int, logged: bool = False) -> None:
        self.stepper.step([self.batches[number % len(self.batches)]], MIDDLE, logged)


def recipe_of(name: str, overrides: list[str], arch: str | None, batch: int | None, precision: str | None) -> Recipe:
    """A recipe as it is measured: one batch of one process, nothing loaded."""
    given = {"model.image.name": arch, "data.batch_size": batch, "train.precision": precision}
    asked = [f"{key}={value}" for key, value in given.items() if value is not None]
    return without_init(recipes.resolve(name, [*asked, "train.accumulate=1", "efficiency.augment=worker", *overrides]))


def prepare(recipe: Recipe, device: torch.device, caption_tokens: int = 77) -> Work:
    """Build the learner of a recipe and random batches for it, on the device."""
    give_back_large_blocks()
    torch.manual_seed(recipe.train.seed)
    learner = build_learner(recipe).to(device)
    examples = recipe.data.batch_size
    used = learner.views()
    sizes = {name: (view.count, examples, 3, view.size, view.size) for name, view in recipe.views.items()}
    images = {name: torch.randn(size, device=device) for name, size in sizes.items() if name in used}
    batches = []
    for number in range(BATCHES):
        batch = without_pixels(recipe, learner, examples, caption_tokens, epoch=number)
        for tokens in batch.captions.values():
            tokens[:, 1:-1] = torch.randint(_FIRST_WORD, _LAST_WORD, tokens[:, 1:-1].shape)
        batches.append(replace(batch.to(device), images=images))
    return Work(recipe, Stepper(learner, recipe, device), batches, device)


def measure(
    recipe: Recipe, device: torch.device, caption_tokens: int = 77, steps: int = 5, warmup: int = 2, kernels: int = 0
) -> dict[str, Any]:
    """Measure steps of a recipe; plain values, ready for JSON.

    Args:
        recipe: as `recipe_of` gives it.
        device: where.
        caption_tokens: tokens of every caption.
        steps, warmup: steps that are timed, and before them steps that are not.
        kernels: how many operations of the longest time are listed, from a profile of one more step.
    """
    empty = resident_gib()
    work = prepare(recipe, device, caption_tokens)
    ready = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else resident_gib()
    watch = Stopwatch(work.stepper, device)
    with repeatable(recipe.efficiency.deterministic), GarbageByHand():
        for number in range(warmup):
            work.step(number)
        finish(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds, processor, parts = _timed(work, watch, device, range(warmup, warmup + steps))
        # Linux keeps the most that was held apart from what is held now, and some pages behind it.
        peak = max(memory_gib(device), ready)
        reserved = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None
        with meetings.counted(device) as waits:
            work.step(0)
        with meetings.counted(device) as waits_logged:
            work.step(1, logged=True)
        profiled = _profiled(work, device, kernels) if kernels else {}
    pairs = recipe.data.batch_size / statistics.median(seconds)
    flops = flops_of_a_pair(recipe, caption_tokens)
    matmul, stated = matmul_rate(device, recipe.train.precision), vendors_peak(device, recipe.train.precision)
    return {
        "recipe": recipe.name,
        "image_tower": recipe.model.image.name,
        "batch": recipe.data.batch_size,
        "precision": recipe.train.precision,
        "caption_tokens": max((tokens.shape[1] for tokens in work.batches[0].captions.values()), default=0),
        "efficiency": recipe.efficiency.model_dump(mode="json"),
        "machine": described(device),
        "parameters": sum(p.numel() for p in work.stepper.gradients.parameters),
        "step_s": statistics.median(seconds),
        "steps_s": seconds,
        "processor_s": statistics.median(processor),
        "pairs_per_s": pairs,
        "flops_per_pair": flops,
        "flops_per_s": flops * pairs,
        "matmul_flops_per_s": matmul,
        "vendor_flops_per_s": stated,
        "utilisation": flops * pairs / (stated or matmul),
        "utilisation_of_matmul": flops * pairs / matmul,
        "memory_gib": {"empty": empty, "ready": ready, "peak": peak, "reserved": reserved},
        "memory_per_pair_mib": 1024 * (peak - ready) / recipe.data.batch_size,
        "parts_s": {name: statistics.median(one[name] for one in parts) for name in parts[-1]},
        "host_waits": sum(waits.values()),
        "host_waits_at": dict(waits),
        "host_waits_logged": sum(waits_logged.values()),
        **profiled,
    }


def _timed(
    work: Work, watch: Stopwatch, device: torch.device, numbers: range
) -> tuple[list[float], list[float], list[dict[str, float]]]:
    """Of each step: seconds, seconds of the processor over all threads, and seconds by part."""
    seconds, processor, parts = [], [], []
    for number in numbers:
        finish(device)
        begun, used = time.perf_counter(), time.process_time()
        watch.start()
        work.step(number)
        finish(device)
        parts.append(watch.stop())
        seconds.append(time.perf_counter() - begun)
        processor.append(time.process_time() - used)
    return seconds, processor, parts


def _profiled(work: Work, device: torch.device, kernels: int) -> dict[str, Any]:
    """The operations of one step that took the longest, by their own time on the device."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        begun = time.perf_counter()
        work.step(2)
        finish(device)
        whole = time.perf_counter() - begun
    events = found.key_averages()
    # On a GPU only kernels count, not the host's operations that launched them and are given their time once more.
    if on_gpu:
        events = [event for event in events if event.device_type != DeviceType.CPU]
    own = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 for event in events}
    calls = {event.key: event.count for event in events}
    longest = sorted(own, key=lambda key: own[key], reverse=True)[:kernels]
    return {
        "profiled_step_s": whole,
        "device_busy_s": sum(own.values()),
        "kernels": [{"name": key, "s": own[key], "calls": calls[key]} for key in longest],
    }


def tables(found: dict[str, Any]) -> Group:
    """What was measured, for a terminal."""
    memory, machine = found["memory_gib"], found["machine"]
    head = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold cyan")
    head.title = (
        f"{found['recipe']}, {found['image_tower']}, batch {found['batch']}, {found['precision']}\n"
        f"{machine['device']}, {machine['threads']} threads, load {machine['load']}"
    )
    head.add_column("")
    head.add_column("", justify="right")
    head.add_row("step", f"{found['step_s']:.3f} s")
    head.add_row("pairs a second", f"{found['pairs_per_s']:.3f}")
    of = "the vendor's peak" if found["vendor_flops_per_s"] else "a matrix product's rate"
    head.add_row(f"utilisation, of {of}", f"{100 * found['utilisation']:.1f} %")
    head.add_row("operations a pair", f"{found['flops_per_pair'] / 1e9:.0f} GFLOP")
    head.add_row("a matrix product's rate", f"{found['matmul_flops_per_s'] / 1e9:.1f} GFLOP/s")
    head.add_row("peak memory", f"{memory['peak']:.2f} GiB")
    head.add_row("of it before the first step", f"{memory['ready']:.2f} GiB")
    head.add_row("host waits in a step (in a logged one)", f"{found['host_waits']} ({found['host_waits_logged']})")
    parts = _shares("Parts of the step", found["parts_s"], found["step_s"])
    if "kernels" not in found:
        return Group(head, parts)
    own = {f"{one['name'][:70]} x {one['calls']}": one["s"] for one in found["kernels"]}
    return Group(head, parts, _shares("Longest operations", own, found["profiled_step_s"]))


def _shares(title: str, seconds: dict[str, float], whole: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold cyan")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{1e3 * value:.1f}", f"{100 * value / whole:.1f} %")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="harmony", help="name or file")
    parser.add_argument("overrides", nargs="*", help="key=value, as for harmony train")
    parser.add_argument("--arch", help="image tower; vit_small_patch16_224 for harmony, else the recipe's")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="fp32 on a CPU, else bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=77, help="of every caption")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="list the N longest operations")
    parser.add_argument("--threads", type=int, help="of the processor; torch's own choice when left out")
    parser.add_argument("--json", type=Path, help="file for the numbers; - for the screen, in place of the table")
    asked = parser.parse_args(arguments)
    if "=" in asked.recipe:  # only overrides were given
        asked.recipe, asked.overrides = parser.get_default("recipe"), [asked.recipe, *asked.overrides]
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    arch = asked.arch or ("vit_small_patch16_224" if asked.recipe.startswith("harmony") else None)
    precision = asked.precision or ("fp32" if device.type == "cpu" else "bf16")
    recipe = recipe_of(asked.recipe, asked.overrides, arch, asked.batch, precision)
    found = measure(recipe, device, asked.tokens, asked.steps, asked.warmup, asked.profile)
    tell(found, tables(found), asked.json)


if __name__ == "__main__":
    with refusals():
        main()
