"""Comparing recipes on equal terms: the same data, model, batch, length, seeds and tasks for all."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from harmony import ranks, recipe_files
from harmony.comparison.page import page
from harmony.comparison.plan import Plan, plan_of
from harmony.comparison.runs import Runs
from harmony.comparison.store import Folder
from harmony.comparison.table import markdown, numbers
from harmony.disk import whole
from harmony.errors import UserError
from harmony.evaluation.progress import say
from harmony.evaluation.results import write_json
from harmony.training import distributed
from harmony.training.distributed import together
from harmony.training.settings import LARGEST_SEED
from harmony.training.signals import Interrupted


def compare(
    arguments: Sequence[str],
    out: Path | str,
    seeds: Sequence[int] = (0, 1, 2),
    tasks: Sequence[str] | None = None,
    data: str | None = None,
    train_data: str | None = None,
) -> Path:
    """Train recipes on equal terms, measure them, and write table and curves; under torchrun with all processes.

    Started again with the same arguments, it goes on where it was interrupted.

    Args:
        arguments: rows and overrides of all rows, see `harmony.comparison.rows`.
        out: directory for all of it, see `harmony.comparison.store`.
        seeds: each row is trained once with each.
        tasks: what is measured; None is knn, linear, zero_shot and retrieval, as far as data and towers allow.
        data: URI to measure on; None is the first recipe's `data.val`.
        train_data: URI of labelled data to learn from; None is its `evaluation.train`, or else the training data.

    Returns:
        The page.

    Raises:
        UserError: something in it cannot work, or `out` holds something else; nothing has been written then.
        Interrupted: a signal stopped it, after saving.
    """
    folder = Folder(Path(out))
    given = [_override("data.val", data)] if data else []
    given += [_override("evaluation.train", train_data)] if train_data else []
    draft = plan_of([*arguments, *given], seeds, tasks, _command(arguments, out, seeds, tasks, data, train_data))
    with distributed.session() as place:
        with together():
            plan = draft.checked(place)
        with folder.opened(plan):
            _tell(plan)
            try:
                runs = Runs(plan, folder, place)
                runs.untrained()
                runs.trained()
            except (Interrupted, KeyboardInterrupt):
                if ranks.is_main():
                    say("Stopped; the same command goes on from here")
                raise
        is_main = ranks.is_main()
    if is_main:
        _write_all(plan, folder)
    return folder.page


def seeds_of(text: str) -> list[int]:
    """The seeds that "0,1,2" names; UserError when it names something else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--seeds {text!r} is not a list of whole numbers; write them as in --seeds 0,1,2")
    seeds = [int(part) for part in parts]
    if max(seeds) > LARGEST_SEED:
        raise UserError(f"--seeds names {max(seeds)}, and a seed is {LARGEST_SEED} at most")
    return seeds


def _override(key: str, value: str) -> str:
    return f"{key}={recipe_files.written_in_line({'v': value}).removeprefix('v: ')}"


def _command(
    arguments: Sequence[str],
    out: Path | str,
    seeds: Sequence[int],
    tasks: Sequence[str] | None,
    data: str | None,
    train_data: str | None,
) -> str:
    """The command line that does the same."""
    words = ["harmony", "compare", *arguments, "--out", str(out), "--seeds", ",".join(map(str, seeds))]
    words += ["--tasks", ",".join(tasks)] if tasks else []
    words += ["--data", data] if data else []
    words += ["--train-data", train_data] if train_data else []
    return shlex.join(words)


def _tell(plan: Plan) -> None:
    """What is about to be done, and what was changed of each recipe for it."""
    if not ranks.is_main():
        return
    say(
        f"Comparing {len(plan.entries)} rows on {plan.pairs['examples']:,} examples of {plan.pairs['uri']}: "
        f"{plan.steps:,} steps of {plan.batch_size:,}, seeds {', '.join(map(str, plan.seeds))}, "
        f"measured by {', '.join(plan.tasks)}"
    )
    for entry in plan.entries:
        missing = [f"{task} n/a" for task in entry.missing]
        told = [*entry.row.changes, *missing, f"its {entry.copy} is measured"]
        say(f"{entry.name}: {'; '.join(told)}")


def _write_all(plan: Plan, folder: Folder) -> None:
    """Write compare.json, compare.md and compare.html."""
    found = numbers(plan, folder)
    write_json(folder.path / "compare.json", found)
    for path, text in {
        folder.path / "compare.md": markdown(found),
        folder.page: page(found, plan, folder.path.resolve().name),
    }.items():
        with whole(path) as aside:
            aside.write_text(text, encoding="utf-8")
