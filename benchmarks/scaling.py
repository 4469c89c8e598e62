"""How much two processes of one thread get done that one cannot, and what crosses ranks in a step of any recipe.

    python -m benchmarks.scaling                                         a small Harmony, 8 pairs a process
    python -m benchmarks.scaling quickstart --batch 16 --rounds 5 --json scaling.json
    python -m benchmarks.scaling harmony --batch 96 --count 8 512        counted for a rank of many; nothing is computed

Every process has as many pairs as the one alone has, so two make twice as many a step. One process, two whose gradients
cross while backward runs, and two whose gradients cross after it take turns. Data are random tensors, as in
benchmarks.step. Seconds of the processor say what the work is when others use the machine; waiting is not in them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import crossings, step
from benchmarks.machine import described
from benchmarks.telling import refusals, tell
from harmony import ranks
from harmony.recipe import Recipe
from harmony.training import distributed
from harmony.training.optimiser import Gradients
from harmony.training.reduction import Reduction
from harmony.training.rehearsal import CLOCK, rehearse
from harmony.training.step import Stepper

WAYS = {"one": 1, "two": 2, "two, reduced after backward": 2}
"""Name -> number of processes."""

SMALL = (
    "model.image={name: vit_tiny_patch16_224, patch: 16, width: 192, depth: 6, heads: 3}",
    "model.text={width: 192, layers: 4, heads: 3, context: 32}",
    "views.global={size: 112}",
    "views.local={count: 4, size: 48}",
    "objectives.dino.head={prototypes: 2048, hidden: 512, bottleneck: 128}",
    "objectives.mae.decoder={width: 128, depth: 2, heads: 4}",
)
"""What makes `harmony` small enough for a processor: the recipe that is measured unless another is named."""


def recipe_of(name: str, overrides: list[str], batch: int) -> Recipe:
    """A recipe with the batch of one process; nothing is drawn while a step runs, so that it can be rehearsed."""
    name, given = ("harmony", [*SMALL, *overrides]) if name == "small" else (name, overrides)
    return step.recipe_of(name, ["model.image.drop_path=0", *given], None, batch, "fp32")


class After(Reduction):
    """All gradients cross after the backward passes."""

    def begin(self) -> None:
        """Watch nothing."""

    def finish(self) -> None:
        ranks.average_gradients(self._parameters)


def timed(recipe: Recipe, steps: int, after: bool) -> dict[str, Any]:
    """Measure steps on this rank, one thread, on the CPU."""
    torch.set_num_threads(1)
    with distributed.session() as place:
        work = step.prepare(recipe, torch.device("cpu"))
        if after:
            work.stepper.reduction = After(work.stepper.gradients.parameters)
        for number in range(2):  # the first teaches the reduction what to expect
            work.step(number)
        seconds, processor, waited = [], [], _Waited(work.stepper)
        for number in range(steps):
            distributed.agree([0])
            begun, used = time.perf_counter(), time.process_time()
            work.step(number)
            seconds.append(time.perf_counter() - begun)
            processor.append(time.process_time() - used)
        with crossings.counted() as found:
            work.step(0)
        return {
            "ranks": place.ranks,
            "steps_s": seconds,
            "processor_s": processor,
            "waited_s": waited.seconds[:steps],
            "gradient_bytes": work.stepper.gradients.bytes,
            "crossing": crossings.by_part(found),
        }


class _Waited:
    """How long each step's reduction keeps the step after its backward passes."""

    def __init__(self, stepper: Stepper) -> None:
        self.seconds: list[float] = []
        finish = stepper.reduction.finish

        def watched() -> None:
            begun = time.perf_counter()
            finish()
            self.seconds.append(time.perf_counter() - begun)

        stepper.reduction.finish = watched  # type: ignore[method-assign]


def measure(arguments: list[str], rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Let the ways take turns, each in processes of its own.

    Args:
        arguments: recipe, overrides and batch, as on the command line.
        rounds: turns of each.
        steps: steps that are timed in a turn.
        folder: for what they find.
    """
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for place, (way, processes) in enumerate(WAYS.items()):
            out = folder / f"{number}.{place}.json"
            own = ["--turn", str(out), "--steps", str(steps), *(["--after"] if "after" in way else [])]
            python = [sys.executable, "-m"]
            if processes > 1:
                python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            subprocess.run([*python, "benchmarks.scaling", *arguments, *own], env=environment, check=True)
            turns[way].append(json.loads(out.read_text()))
    return {way: _joined(found) for way, found in turns.items()}


def _joined(turns: list[dict[str, Any]]) -> dict[str, Any]:
    every = {key: [value for turn in turns for value in turn[key]] for key in ("steps_s", "processor_s", "waited_s")}
    return turns[0] | every


def compared(ways: dict[str, Any], batch: int) -> dict[str, Any]:
    """Pairs a second and efficiencies, from medians and from the best step of each."""
    pairs = {way: batch * WAYS[way] for way in ways}
    found: dict[str, Any] = {}
    for way, one in ways.items():
        alone = ways["one"]
        found[way] = {
            "step_s": statistics.median(one["steps_s"]),
            "pairs_per_s": pairs[way] / statistics.median(one["steps_s"]),
            "efficiency": statistics.median(alone["steps_s"]) / statistics.median(one["steps_s"]),
            "efficiency_of_best": min(alone["steps_s"]) / min(one["steps_s"]),
            "efficiency_of_processor": statistics.median(alone["processor_s"]) / statistics.median(one["processor_s"]),
            "waited_s": statistics.median(one["waited_s"]),
            "bytes_per_step": sum(row["bytes"] for row in one["crossing"].values()),
        }
    return found


def count(recipe: Recipe, world: int, tokens: int = 77) -> dict[str, Any]:
    """What crosses between `world` ranks in a step that is not logged, from a rehearsal of it on one of them.

    The few numbers that `Stepper` itself averages, one for each loss, are not in it.

    Args:
        recipe: its batch is that of one rank.
        world: how many ranks.
        tokens: of every caption.
    """
    joined = recipe.data.model_copy(update={"batch_size": recipe.data.batch_size * world})
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        rehearsal = rehearse(recipe.model_copy(update={"data": joined}), tokens, world)
        learner = rehearsal.learner
        gradients = Gradients(learner.parts(), recipe.optim)
        reduction, last = Reduction(gradients.parameters), _Last(gradients)
        with crossings.counted() as found:
            reduction.begin()
            with rehearsal.mode:
                groups = learner.losses_by_group(rehearsal.batch, CLOCK)
                while (group := next(groups, None)) is not None:
                    last.group = "+".join(group.objectives)
                    group.total().backward()
            reduction.finish()
            with rehearsal.mode:
                learner.after_update(CLOCK, 0.9, torch.tensor(True))
    finally:
        dist.destroy_process_group()
    found = [one for one in found if one.operation != "broadcast"]  # of the first step alone
    return {
        "ranks": world,
        "batch_of_a_rank": recipe.data.batch_size,
        "crossing": crossings.by_part(found),
        "final_after": last.bytes(),
        "bytes_sent": {
            "gradients": sum(one.sent(world) for one in found if one.part == "gradients"),
            "losses": sum(one.sent(world) for one in found if one.part != "gradients"),
        },
    }


class _Last:
    """Which group of objectives is the last to reach a parameter, so that its gradient can leave."""

    def __init__(self, gradients: Gradients) -> None:
        self.group = ""
        self._of: dict[torch.nn.Parameter, str] = {}
        for parameter in gradients.parameters:
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: torch.nn.Parameter) -> None:
        self._of.pop(parameter, None)
        self._of[parameter] = self.group

    def bytes(self) -> dict[str, int]:
        """Of the gradients that are final with a group, in the order of the step."""
        found: dict[str, int] = {}
        for parameter, group in self._of.items():
            found[group] = found.get(group, 0) + parameter.nbytes
        return found


def table(found: dict[str, Any]) -> Table:
    machine, load = found["machine"], found["load"]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold cyan")
    busy = f"load {load['before']:.1f} to {load['after']:.1f}"
    shown.title = f"{found['recipe']}, {found['batch']} pairs a process, one thread each\n{machine['device']}, {busy}"
    named = ("step, s", "pairs/s", "efficiency", "of the best", "of the processor", "waits, s", "MB a step")
    shown.add_column("")
    for name in named:
        shown.add_column(name, justify="right")
    for way, one in found["compared"].items():
        values = (f"{one['step_s']:.3f}", f"{one['pairs_per_s']:.2f}")
        shares = (f"{one[key]:.2f}" for key in ("efficiency", "efficiency_of_best", "efficiency_of_processor"))
        shown.add_row(way, *values, *shares, f"{one['waited_s']:.3f}", f"{one['bytes_per_step'] / 1e6:.1f}")
    return shown


def table_of_counts(counts: list[dict[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("a step of one rank")
    for one in counts:
        shown.add_column(f"of {one['ranks']}: calls", justify="right")
        shown.add_column("bytes", justify="right")
    for part in counts[0]["crossing"]:
        rows = [one["crossing"][part] for one in counts]
        shown.add_row(part, *(f"{value:,}" for row in rows for value in (row["calls"], row["bytes"])))
    for group in counts[0]["final_after"]:
        shown.add_row(
            f"gradients final after {group}", *(x for c in counts for x in ("", f"{c['final_after'][group]:,}"))
        )
    for part in ("gradients", "losses"):
        shown.add_row(
            f"sent around a ring: {part}", *(x for c in counts for x in ("", f"{c['bytes_sent'][part]:,.0f}"))
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="small", help="name or file; a small harmony when left out")
    parser.add_argument("overrides", nargs="*", help="key=value, as for harmony train")
    parser.add_argument("--batch", type=int, default=8, help="pairs a process")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--count", type=int, nargs="+", metavar="RANKS", help="count what crosses between so many")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--after", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_intermixed_args(arguments)
    if "=" in asked.recipe:  # only overrides were given
        asked.recipe, asked.overrides = parser.get_default("recipe"), [asked.recipe, *asked.overrides]
    recipe = recipe_of(asked.recipe, asked.overrides, asked.batch)
    if asked.turn:
        found = timed(recipe, asked.steps, asked.after)
        if int(os.environ.get("RANK", 0)) == 0:
            asked.turn.write_text(json.dumps(found))
        return
    if asked.count:
        found = {"recipe": recipe.name, "counts": [count(recipe, number) for number in asked.count]}
        shown = table_of_counts(found["counts"])
    else:
        load, own = os.getloadavg()[0], [asked.recipe, *asked.overrides, "--batch", str(asked.batch)]
        with tempfile.TemporaryDirectory() as folder:
            ways = measure(own, asked.rounds, asked.steps, Path(folder))
        found = {
            "recipe": recipe.name,
            "batch": asked.batch,
            "machine": described(torch.device("cpu")),
            "load": {"before": load, "after": os.getloadavg()[0]},
            "compared": compared(ways, asked.batch),
            "ways": ways,
        }
        shown = table(found)
    tell(found, shown, asked.json)


if __name__ == "__main__":
    with refusals():
        main()
