"""`train`: Harmony, as published, CLIP and SLIP on Flickr8k at equal examples seen, by `harmony compare`.

A visit whose time is over stops the comparison, which saves; the next one that finds its folder goes on.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.visit.running import Found, Setting, Stage, Task

ROWS = ("harmony", "harmony-published", "clip", "slip")

FLICKR = "shards:{data}/captions/flickr8k/{split}.tar"

SIZES = (
    "model.image.name=vit_small_patch16_224",
    "model.text.width=384",
    "model.text.layers=6",
    "model.text.heads=6",
    "model.text.context=40",
    "model.embed=256",
    "views.global.size=112",
    "views.local.size=48",
    "views.augmented.size=112",
    "data.batch_size=256",
    "train.epochs=40",
    "train.checkpoint_every=10 epochs",
    "train.precision=bf16",
)
"""ViT-S/16 at 112 px; 5,999 images, so 240 thousand pairs for each row."""

OPTIMISER = (
    "optim.lr=5e-4",
    "optim.warmup=10%",
    "optim.weight_decay=0.1",
    "optim.clip_norm=3.0",
    "teacher.momentum={cosine: {from: 0.99, to: 1.0}}",
)
"""The same for all rows: SLIP's and CLIP's own rates are for batches sixteen times as large."""

TINY = (
    "model.image={name: vit_tiny_patch16_224, patch: 8, width: 16, depth: 1, heads: 2}",
    "model.text.width=16",
    "model.text.layers=1",
    "model.text.heads=2",
    "model.text.context=16",
    "model.embed=16",
    "views.global.size=32",
    "views.local={count: 2, size: 16}",
    "views.augmented.size=32",
    "objectives.dino.head={prototypes: 24, hidden: 16, bottleneck: 8}",
    "objectives.mae.decoder.width=16",
    "objectives.mae.decoder.depth=1",
    "objectives.mae.decoder.heads=2",
    "objectives.text_distillation.head={prototypes: 24, hidden: 16, bottleneck: 8}",
    "objectives.simclr.head={hidden: 16, output: 8}",
    "data.batch_size=4",
    "data.workers=0",
    "train.steps=2",
    "train.checkpoint_every=1 step",
    "train.precision=fp32",
    "evaluation.max_examples=8",
)

COPIES = ("teacher", "student")

_SAVING = 25.0
"""Seconds that are left for the step in hand, a checkpoint, and what is copied."""


def tasks(setting: Setting) -> Stage:
    """Train and measure, as far as the time goes; options are settings of all rows, or rows in place of ROWS."""
    folder = setting.keep / "train"
    compared = yield Task("compare", partial(_compared, setting, folder), 30)
    yield Task("what there is", partial(_collected, setting, folder), 0)
    if compared is not None and compared.get("finished"):
        yield Task("nearest neighbours", partial(_neighbours, setting, folder), 60)


def words(setting: Setting, folder: Path) -> list[str]:
    """The command line of the comparison."""
    rows = [option for option in setting.options if "=" not in option] or (ROWS[::3] if setting.tiny else ROWS)
    changes = [option for option in setting.options if "=" in option]
    if setting.tiny:
        data = ["data.train=scenes:train?size=32&count=16", "data.val=scenes:held_out?size=32&count=8"]
        sizes = [*data, *TINY, "optim.warmup=1 step"]
    else:
        train = FLICKR.format(data=setting.data, split="train-*")
        val = FLICKR.format(data=setting.data, split="val-*")
        sizes = [f"data.train={train}", f"data.val={val}", f"data.workers={setting.workers}", *SIZES, *OPTIMISER]
    return ["compare", *rows, *sizes, *changes, "--seeds", "0", "--tasks", "retrieval", "--out", str(folder)]


def _compared(setting: Setting, folder: Path) -> Found:
    """Go on with the comparison until it is finished or the time is nearly over."""
    from harmony.cli import main

    command = words(setting, folder)
    with _interrupted_after(max(1.0, setting.budget.left() - _SAVING)), contextlib.redirect_stdout(sys.stderr):
        status = main(command)
    found: Found = {"finished": status == 0, "status": status, "details": {"command": ["harmony", *command]}}
    return found if status in (0, 130) else {**found, "failed": f"harmony compare left with status {status}"}


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Press Ctrl-C for the block after some seconds, which a run takes as the wish to save and leave."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _collected(setting: Setting, folder: Path) -> Found:
    """Where every run stands, what was measured of it, and its log thinned; the page and the table are copied."""
    for name in ("compare.html", "compare.md"):
        if (folder / name).is_file():
            setting.out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, setting.out / name)
    runs: Found = {}
    logs: Found = {}
    for run in sorted((folder / "runs").glob("*/seed-*")):
        name = run.parent.name
        lines = [json.loads(line) for line in _read(run / "log.jsonl").splitlines()]
        measured: dict[str, Any] = json.loads(_read(run / "measured.json") or "{}")
        last = lines[-1] if lines else {}
        kept = ("step", "loss", "examples_per_second", "data_wait")
        runs[name] = {key: last[key] for key in kept if key in last} | {"curve": measured.get("curve", {})}
        logs[name] = lines[:: max(1, len(lines) // 100)]
    return {"runs": runs, "details": logs}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _neighbours(setting: Setting, folder: Path) -> Found:
    """Nearest neighbours on CIFAR-10 of both copies of every run, where the set is there: the image tower alone."""
    from harmony.evaluation import run as evaluate

    uri = f"npz:{setting.data}/classification/cifar10_subset.npz?split="
    if not Path(uri.partition(":")[2].partition("?")[0]).is_file():
        return {"left_out": "no classification/cifar10_subset.npz among the data"}
    found: Found = {}
    for run in sorted((folder / "runs").glob("*/seed-*")):
        if (run / "checkpoints").is_dir():
            copies = {copy: evaluate(str(run), "knn", f"{uri}test", f"{uri}train", copy) for copy in COPIES}
            found[run.parent.name] = copies
    return found
