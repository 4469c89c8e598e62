"""Every task on the small real sets beside the project: a run's teacher and its untrained twin, as one table.

    python -m benchmarks.real_data RUN --out runs/real            (half an hour or so on two CPU cores)
    python -m benchmarks.real_data RUN --out runs/real --table    (only the table, from what is there)

Each line of `EVALUATIONS` is one `harmony evaluate` command, which is printed before it runs. What is measured already
is not measured again, so an interrupted run goes on.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

CIFAR = "npz:{data}/classification/cifar10_subset.npz?split={split}"
CLOTHING = "shards:{data}/classification/clothing10/{split}-*.tar"
CAMVID = "masks:{data}/segmentation/camvid/{split}.tar"
BCCD = "coco:{data}/detection/bccd/annotations/instances_{split}.json?images={data}/detection/bccd/images_{split}.tar"
COCO = (
    "coco:{data}/detection/coco_mini/annotations/instances_{split}.json"
    "?images={data}/detection/coco_mini/images_{split}.tar"
)
FLICKR = "shards:{data}/captions/flickr8k/{split}-*.tar"

FINE_TUNE = ("epochs=10", "lr=2e-3", "mixup=0", "cutmix=0", "randaugment=null", "random_erasing=0")
SEGMENTATION = ("size=96", "epochs=8")
DETECTION = (
    *("size=160", "steps=150", "train_batch_size=4", "lr=1e-3", "drop_path=0", "scale=[0.7,1.4]"),
    *("channels=32", "regions=64", "proposals=100"),
)

EVALUATIONS = {
    # name: (task, data, split to measure on, split to learn from, settings)
    "flickr8k-retrieval": ("retrieval", FLICKR, "val", None, ()),
    "cifar10-zero_shot": ("zero_shot", CIFAR, "test", None, ()),
    "clothing10-zero_shot": ("zero_shot", CLOTHING, "test", None, ()),
    "cifar10-knn": ("knn", CIFAR, "test", "train", ()),
    "clothing10-knn": ("knn", CLOTHING, "test", "train", ()),
    "cifar10-linear": ("linear", CIFAR, "test", "train", ()),
    "clothing10-linear": ("linear", CLOTHING, "test", "train", ()),
    "camvid-linear": ("segmentation", CAMVID, "val", "train", ("head=linear", *SEGMENTATION)),
    "camvid-multi_linear": ("segmentation", CAMVID, "val", "train", ("head=multi_linear", *SEGMENTATION)),
    "camvid-upernet": ("segmentation", CAMVID, "val", "train", ("head=upernet", "channels=64", *SEGMENTATION)),
    "cifar10-fine_tune": ("fine_tune", CIFAR, "test", "train", FINE_TUNE),
    "clothing10-fine_tune": ("fine_tune", CLOTHING, "test", "train", FINE_TUNE),
    "bccd-detection": ("detection", BCCD, "val", "train", DETECTION),
    "coco_mini-detection": ("detection", COCO, "val", "train", DETECTION),
}

SHOWN = {
    "retrieval": ("text_to_image_recall@10", "image_to_text_recall@10"),
    "zero_shot": ("top1",),
    "knn": ("top1",),
    "linear": ("top1",),
    "fine_tune": ("top1",),
    "segmentation": ("miou", "pixel_accuracy"),
    "detection": ("box_ap", "box_ap50", "mask_ap"),
}
"""The metrics in the table; those that a set does not have are left out."""

MODELS = ("teacher", "untrained")


def command(name: str, run: str, model: str, data: str, out: Path) -> list[str]:
    task, uri, test, train, settings = EVALUATIONS[name]
    words = ["harmony", "evaluate", run, "--task", task, "--model", model, "--data", uri.format(data=data, split=test)]
    if train is not None:
        words += ["--train-data", uri.format(data=data, split=train)]
    for setting in settings:
        words += ["--set", setting]
    return [*words, "--out", str(out / model / name)]


def table(out: Path) -> str:
    rows = ["| set | task | metric | trained | untrained twin | chance |", "| --- | --- | --- | --- | --- | --- |"]
    for name, (task, *_) in EVALUATIONS.items():
        found = [_metrics(out / model / name, task) for model in MODELS]
        for metric in SHOWN[task]:
            if not any(metric in metrics for metrics in found):
                continue
            values = [_percent(metrics.get(metric)) for metrics in found]
            chance = _percent(found[0].get(f"chance_{metric}"))
            rows.append(f"| {name} | {task} | {metric} | {values[0]} | {values[1]} | {chance} |")
    return "\n".join(rows)


def _metrics(folder: Path, task: str) -> dict[str, float]:
    path = folder / "metrics.json"
    return json.loads(path.read_text()).get(task, {}) if path.is_file() else {}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--data", default="../shared/data", help="folder with the sets")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder for the results")
    parser.add_argument("--only", nargs="*", choices=sorted(EVALUATIONS), help="these alone")
    parser.add_argument("--table", action="store_true", help="only print the table of what has been measured")
    arguments = parser.parse_args()
    failed = 0
    for name in [] if arguments.table else arguments.only or EVALUATIONS:
        for model in MODELS:
            if _metrics(arguments.out / model / name, EVALUATIONS[name][0]):
                continue
            words = command(name, arguments.run, model, arguments.data, arguments.out)
            print(shlex.join(words), flush=True)
            start = time.monotonic()
            status = subprocess.run([sys.executable, "-m", *words], check=False).returncode
            print(f"status {status}, {time.monotonic() - start:.0f} s", flush=True)
            failed += status != 0
    print(table(arguments.out))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
