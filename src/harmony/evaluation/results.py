"""What evaluation leaves behind: `metrics.json`, {task: {metric: number}}, and `evaluation/TASK.json` for the report.

Both are written aside and renamed, so that a reader, or an interruption, never meets half a file. Metrics that are
shares (recall, accuracy, chance levels) are fractions between 0 and 1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmony.disk import whole
from harmony.errors import UserError

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
        metrics: its numbers, for metrics.json.
        details: whatever else its part of the report shows, as JSON.
    """

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


def read_metrics(folder: Path) -> Metrics:
    """All results in `folder`; none when nothing has been evaluated there.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "metrics.json"
    if not path.exists():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not valid JSON; move it away and evaluate again") from None
    if not isinstance(metrics, dict) or not all(isinstance(numbers, dict) for numbers in metrics.values()):
        raise UserError(f"{path} is not of the form {{task: {{metric: number}}}}; move it away and evaluate again")
    return metrics


def write_metrics(folder: Path, task: str, metrics: Mapping[str, float]) -> None:
    """Put one task's numbers into `folder`/metrics.json, beside those of other tasks."""
    write_json(folder / "metrics.json", read_metrics(folder) | {task: dict(metrics)})


def read_details(folder: Path, task: str) -> dict[str, Any] | None:
    """What the task kept for the report; None when there is nothing that can be read."""
    try:
        details = json.loads((folder / "evaluation" / f"{task}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return details if isinstance(details, dict) else None


def write_details(folder: Path, task: str, details: Mapping[str, Any]) -> None:
    """Keep what the report shows of a task beyond its numbers."""
    write_json(folder / "evaluation" / f"{task}.json", details)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file by one with this content, all or nothing; UserError when the disk has no room for it."""
    with whole(path) as aside:
        aside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
