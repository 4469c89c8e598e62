"""A visit to a machine with a GPU: one stage in one command of less than nine minutes, with nobody there to help.

    python -m benchmarks.gpu_visit ready                       what is missing on this machine, and what would run
    python -m benchmarks.gpu_visit correct --out results       the device computes what the CPU computes
    python -m benchmarks.gpu_visit step                        ViT-S, B and L: batches, utilisation, memory, kernels
    python -m benchmarks.gpu_visit peers                       open_clip, transformers' ViTMAE, plain parts of DINO
    python -m benchmarks.gpu_visit loader                      all cores feeding the device
    python -m benchmarks.gpu_visit train --data data           Harmony, as published, CLIP, SLIP on Flickr8k

A stage writes `OUT/STAGE.json` after each of its tasks, begins none for which the time is too short, names those that
it left out, and prints the report without its details. Exit status: 0, or 1 when a task failed or found something
wrong. docs/gpu-visit.md says how a visit is prepared.
"""

import argparse
import importlib
import json
import os
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "src"):  # as a script, and where nothing is installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

STAGES = {
    # stage: module with its tasks
    "correct": "proofs",
    "step": "steps",
    "peers": "peering",
    "loader": "loading",
    "train": "training",
}

SECONDS = 490.0
"""What a stage takes by itself, so that with imports and the last task's grace it stays below nine minutes."""

_IMPORTED = {"open_clip_torch": "open_clip", "pillow": "PIL", "pyyaml": "yaml", "faster-coco-eval": "faster_coco_eval"}


def ready() -> dict[str, Any]:
    """Which packages are here, in which version, and which are not or too old; nothing of the project is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, Any] = {"python": sys.version.split()[0], "here": {}, "older": [], "missing": [], "broken": {}}
    for wanted in [*project["dependencies"], "transformers>=5.0"]:
        name, _, least = wanted.partition(">=")
        try:
            importlib.import_module(_IMPORTED.get(name, name))
            found["here"][name] = version(name)
            if _numbers(version(name)) < _numbers(least):
                found["older"].append(f"{name} {version(name)}, where {least} is the oldest that will do")
        except PackageNotFoundError:
            found["here"][name] = "?"
        except ModuleNotFoundError as error:
            found["missing"].append(f"{wanted} ({error})")
        except Exception as error:
            found["broken"][name] = f"{type(error).__name__}: {error}"
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["ready", *STAGES])
    parser.add_argument("options", nargs="*", help="recipes (correct), peers, rows (train), or key=value for recipes")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/visit")), help="to be taken away")
    parser.add_argument("--keep", type=Path, default=Path("runs/visit-kept"), help="what is large, such as runs")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with data sets")
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden", help="with recorded steps")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after these nothing new is begun")
    parser.add_argument("--device", help="cuda where there is one")
    parser.add_argument("--workers", type=int, help="processes that load; one less than cores when left out")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, on any machine: does everything run?")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    asked = _arguments(arguments)
    if asked.stage == "ready":
        found = ready()
        print(json.dumps(found, indent=1))
        return 1 if any(found[fault] for fault in ("older", "missing", "broken")) else 0

    import torch

    from benchmarks.machine import described
    from benchmarks.visit.running import Budget, Setting, brief, carry_out

    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    setting = Setting(
        device=device,
        tiny=asked.tiny,
        out=asked.out,
        keep=asked.keep,
        golden=asked.golden,
        data=asked.data,
        workers=max(1, (os.cpu_count() or 2) - 1) if asked.workers is None else asked.workers,
        options=tuple(asked.options),
        budget=Budget(asked.seconds),
    )
    if device.type == "cpu" and not asked.tiny:
        print("no GPU is here; add --tiny to see whether everything runs, or --device cpu if you have days")
        if asked.device is None:
            return 2
    module = importlib.import_module(f"benchmarks.visit.{STAGES[asked.stage]}")
    about = {"machine": described(device), "tiny": asked.tiny, "options": list(setting.options)}
    report = carry_out(asked.stage, module.tasks(setting), setting, about)
    print(json.dumps(brief(report)))
    return 1 if report["failed"] or report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
