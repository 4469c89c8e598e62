"""Our training step against others', on the same towers, batch, precision and optimiser, in turn, on random tensors.

    python -m benchmarks.peers                                      all of them, ViT-S/16, batch 8, fp32 on a CPU
    python -m benchmarks.peers clip mae --arch vit_base_patch16_224 --batch 96 --precision bf16 --rounds 20
    python -m benchmarks.peers ibot --json ibot.json

`times` is their median step over ours: above 1 ours is the faster one.
"""

import argparse
import gc
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table

from benchmarks.machine import described
from benchmarks.step import Work, prepare, recipe_of
from benchmarks.telling import tell
from benchmarks.turns import Way, in_turn, kept_by


@dataclass(frozen=True)
class Peer:
    """Another way of making the step of a recipe.

    Attributes:
        recipe: ours.
        build: makes their step from our work.
        differs: what is not the same, in words.
        needs: a package that may not be there.
    """

    recipe: str
    build: Callable[[Work], Way]
    differs: str
    needs: str | None = None


def peers() -> dict[str, Peer]:
    """All that can be imported here, by name; of the others, only what they need."""
    from benchmarks.peers import open_clip_step, plain_distillation

    differs = plain_distillation.DIFFERS
    found = {
        "clip": Peer("clip", open_clip_step.build, open_clip_step.DIFFERS),
        "dino": Peer("dino", partial(plain_distillation.build, tokens="all"), differs["dino"]),
        "ibot": Peer("ibot", partial(plain_distillation.build, tokens="all"), differs["all"]),
        "ibot-needed": Peer("ibot", partial(plain_distillation.build, tokens="needed"), differs["needed"]),
    }
    if importlib.util.find_spec("transformers") is None:
        return found | {"mae": Peer("mae", _absent, "", needs="transformers")}
    from benchmarks.peers import vit_mae_step

    return found | {"mae": Peer("mae", vit_mae_step.build, vit_mae_step.DIFFERS)}


NAMES = ("clip", "mae", "dino", "ibot", "ibot-needed")


def _absent(work: Work) -> Way:
    raise ModuleNotFoundError("the package of this peer is not installed")


def ours(work: Work) -> Way:
    """The step that `harmony train` makes."""
    stepper = work.stepper
    return Way("harmony", work.step, lambda: kept_by([stepper.learner], stepper.optimiser))


def compare(
    name: str,
    device: torch.device,
    overrides: list[str],
    arch: str | None,
    batch: int,
    precision: str,
    rounds: int = 5,
    warmup: int = 2,
) -> dict[str, Any]:
    """Both steps in turn; plain values, ready for JSON. `left_out` says why where a package is missing."""
    peer = peers()[name]
    if peer.needs is not None:
        return {"peer": name, "left_out": f"{peer.needs} is not installed"}
    recipe = recipe_of(peer.recipe, overrides, arch, batch, precision)
    work = prepare(recipe, device)
    ways = [ours(work), peer.build(work)]
    found = in_turn(ways, device, rounds, warmup)
    mine, theirs = (found[way.name] for way in ways)
    by_round = [b / a for a, b in zip(mine["steps_s"], theirs["steps_s"], strict=True)]
    result = {
        "peer": name,
        "recipe": recipe.name,
        "image_tower": recipe.model.image.name,
        "batch": batch,
        "precision": precision,
        "machine": described(device),
        "ours": mine,
        "theirs": {"name": ways[1].name, **theirs},
        "times": theirs["step_s"] / mine["step_s"],
        "times_by_round": [min(by_round), statistics.median(by_round), max(by_round)],
        "processor_times": theirs["processor_s"] / mine["processor_s"],
        "memory_share": _whole(mine) / _whole(theirs) if _whole(mine) and _whole(theirs) else None,
        "differs": peer.differs,
    }
    del work, ways
    gc.collect()
    return result


def _whole(found: dict[str, Any]) -> float:
    return 0.0 if found["step_gib"] is None else found["kept_gib"] + found["step_gib"]


def tables(results: list[dict[str, Any]]) -> Group:
    """All that was measured, for a terminal, and what differs below."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("peer", "image tower", "batch", "ours, s", "theirs, s", "times", "processor", "ours, GiB", "theirs"):
        table.add_column(name, justify="left" if name in ("peer", "image tower") else "right")
    for one in results:
        if "left_out" in one:
            table.add_row(one["peer"], one["left_out"])
            continue
        low, middle, high = one["times_by_round"]
        table.add_row(
            one["peer"],
            one["image_tower"],
            f"{one['batch']} {one['precision']}",
            f"{one['ours']['step_s']:.3f}",
            f"{one['theirs']['step_s']:.3f}",
            f"{one['times']:.2f} ({low:.2f} {middle:.2f} {high:.2f})",
            f"{one['processor_times']:.2f}",
            *(f"{_whole(one[side]):.2f}" for side in ("ours", "theirs")),
        )
    notes = [f"{one['peer']}: {one['differs']}" for one in results if "left_out" not in one]
    return Group(table, "times: median, and least, median and most of a round", *notes)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words", nargs="*", metavar="PEER|KEY=VALUE", help=f"of {', '.join(NAMES)}; settings of recipes"
    )
    parser.add_argument("--arch", default="vit_small_patch16_224", help="image tower; '' for the recipe's own")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="fp32 on a CPU, else bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before them")
    parser.add_argument("--threads", type=int, help="of the processor; torch's own choice when left out")
    parser.add_argument("--json", type=Path, help="file for the numbers; - for the screen, in place of the table")
    asked = parser.parse_args(arguments)
    chosen = [word for word in asked.words if "=" not in word]
    if unknown := [word for word in chosen if word not in NAMES]:
        parser.error(f"no peer is called {unknown[0]!r}; choose of {', '.join(NAMES)}")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    precision = asked.precision or ("fp32" if device.type == "cpu" else "bf16")
    overrides = [word for word in asked.words if "=" in word]
    sizes = (asked.arch or None, asked.batch, precision, asked.rounds, asked.warmup)
    results = [compare(name, device, overrides, *sizes) for name in chosen or NAMES]
    tell(results, tables(results), asked.json)
    return results


if __name__ == "__main__":
    main()
