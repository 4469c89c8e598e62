"""The numbers of a comparison: mean and spread over seeds, the best of each column; and the table in Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from harmony.comparison.plan import Entry, Plan
from harmony.comparison.rows import UNTRAINED
from harmony.comparison.store import Folder, Measured, installed
from harmony.evaluation.report.cost import counted
from harmony.evaluation.report.html import operations
from harmony.evaluation.report.words import BOTH, TASKS, chance_of, headlines, metric
from harmony.evaluation.results import Metrics

Values = dict[str, Any]
"""What compare.json holds, or a part of it."""

DIGITS = 1
"""Behind the point of a percentage; rows whose means are equal so far are equally good."""


def numbers(plan: Plan, folder: Folder) -> Values:
    """Everything that compare.json holds, from the runs as they were measured.

    Not for several ranks at once: the cost of a pair is counted as one process sees it.
    """
    twin = {seed: folder.read(folder.run(UNTRAINED, seed)) for seed in plan.seeds}
    rows, every = [_untrained(plan, twin)], [*twin.values()]
    for entry in plan.entries:
        runs = {seed: folder.read(folder.run(entry.row.asked.folder, seed)) for seed in plan.seeds}
        rows.append(_row(plan, entry, runs))
        every += runs.values()
    columns = _columns(plan, rows)
    for row in rows:
        row["cells"] = {column["key"]: _cell(row, column) for column in columns}
    for column in columns:
        mark_best([row["cells"][column["key"]] for row in rows])
    return {
        "command": plan.command,
        "versions": _versions(every),
        "pairs": dict(plan.pairs),
        "measured_on": plan.data.uri,
        "learned_from": plan.train.uri,
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "examples": plan.steps * plan.batch_size,
        "seeds": list(plan.seeds),
        "tasks": list(plan.tasks),
        "along": list(plan.along),
        "begins_untrained": plan.first.model.init is None,
        "begin_elsewhere": [entry.name for entry in plan.entries if _positions(entry) != _positions(plan.twin)],
        "columns": columns,
        "rows": rows,
    }


def _versions(runs: Sequence[Measured]) -> dict[str, str]:
    """The versions that runs were made with, by package; several of one package where runs differ."""
    made_with = [run.software for run in runs if run.software]
    return {
        package: " and ".join(sorted({software[package] for software in made_with if package in software})) or now
        for package, now in installed().items()
    }


def _positions(entry: Entry) -> str:
    """The one setting of the tower that is a row's own and changes how it is drawn."""
    return entry.row.recipe.model.image.position_embedding


def _untrained(plan: Plan, runs: Mapping[int, Measured]) -> Values:
    missing = dict(plan.twin.missing)
    return {
        "name": UNTRAINED,
        "recipe": None,
        "like": plan.twin.name,
        "flops_a_pair": None,
        "missing": missing,
        "runs": {str(seed): _run(plan, run.curve, 0.0, None) for seed, run in runs.items()},
    }


def _row(plan: Plan, entry: Entry, runs: Mapping[int, Measured]) -> Values:
    asked, flops = entry.row.asked, counted(entry.row.recipe).flops
    return {
        "name": entry.name,
        "recipe": asked.recipe,
        "overrides": list(asked.own),
        "changes": list(entry.row.changes),
        "copy": entry.copy,
        "flops_a_pair": flops,
        "missing": dict(entry.missing),
        "runs": {str(seed): _run(plan, run.curve, flops, run.failed) for seed, run in runs.items()},
    }


def _run(plan: Plan, curve: Mapping[int, Metrics], flops: float, failed: str | None) -> Values:
    """One run: its last metrics, and the curve to them."""
    points = [
        {
            "step": step,
            "examples": step * plan.batch_size,
            "flops": step * plan.batch_size * flops,
            "metrics": curve[step],
        }
        for step in sorted(curve)
    ]
    return {"failed": failed, "metrics": points[-1]["metrics"] if points and not failed else {}, "curve": points}


def _columns(plan: Plan, rows: Sequence[Values]) -> list[Values]:
    """The headline metrics of every task, two where two are of equal rank."""
    columns = []
    for task in plan.tasks:
        found = [run["metrics"][task] for row in rows for run in row["runs"].values() if task in run["metrics"]]
        for name in headlines(task, found[0])[: 2 if task in BOTH else 1] if found else []:
            title = f"{TASKS.get(task, task)}, {metric(name)}"
            column: Values = {"key": f"{task}/{name}", "task": task, "metric": name, "title": title}
            columns.append(column | {"chance": chance_of(name, found[0])})
    return columns


def _cell(row: Values, column: Mapping[str, Any]) -> Values:
    """A row's value in a column: mean and spread over the seeds that did not fail."""
    task, name = column["task"], column["metric"]
    if task in row["missing"]:
        return {"missing": row["missing"][task]}
    values = [run["metrics"][task][name] for run in row["runs"].values() if task in run["metrics"]]
    failed = sum(run["failed"] is not None for run in row["runs"].values())
    if not values:
        return {"missing": "failed"}
    return {"mean": statistics.fmean(values), "spread": spread(values), "values": values, "failed": failed}


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of which `values` are a sample (n - 1); None of one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def mark_best(cells: Sequence[Values]) -> None:
    """Say of each cell with a mean whether it is the best; all that are equal as they are shown."""
    shown = [round(100 * cell["mean"], DIGITS) for cell in cells if "mean" in cell]
    for cell in cells:
        if "mean" in cell:
            cell["best"] = round(100 * cell["mean"], DIGITS) == max(shown)


def shown(cell: Mapping[str, Any]) -> str:
    """A cell in plain text, in percent."""
    if "mean" not in cell:
        return "failed" if cell["missing"] == "failed" else "n/a"
    text = f"{100 * cell['mean']:.{DIGITS}f}"
    if cell["spread"] is not None:
        text += f" ± {100 * cell['spread']:.{DIGITS}f}"
    if cell["failed"]:
        text += f" ({cell['failed']} failed)"
    return text


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the table, a sentence each."""
    seeds = found["seeds"]
    over = f"Mean ± standard deviation over the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "One seed"
    seen = f"{found['examples']:,} examples ({found['steps']:,} steps of {found['batch_size']:,})"
    before = "before its first step" if found["begins_untrained"] else "as it is drawn, without model.init"
    said = [
        f"{over}, in percent; bold is the best, and whatever equals it as shown.",
        f"Every run saw {seen} of {found['pairs']['uri']}.",
        f"Measured on {found['measured_on']}; what learns from labels does so from {found['learned_from']}.",
        f"{UNTRAINED} is the model of {found['rows'][0]['like']} {before}.",
    ]
    if found["begin_elsewhere"]:
        said.append(f"Begun from a tower with other positions than {UNTRAINED}: {', '.join(found['begin_elsewhere'])}.")
    student = [row["name"] for row in found["rows"] if row.get("copy") == "student"]
    if student:
        said.append(f"Measured by their student, as nothing in them asks a teacher: {', '.join(student)}.")
    mixed = [f"{package} {numbers}" for package, numbers in found["versions"].items() if " and " in numbers]
    if mixed:
        said.append(f"Not all runs are of the same software: {'; '.join(mixed)}.")
    return said


def markdown(found: Values) -> str:
    """compare.md: the table, and what has to be known to read it."""
    columns = found["columns"]
    lines = [["method", "operations a pair", *(column["title"] for column in columns)]]
    for row in found["rows"]:
        cells = [row["cells"][column["key"]] for column in columns]
        texts = [f"**{shown(cell)}**" if cell.get("best") else shown(cell) for cell in cells]
        flops = row["flops_a_pair"]
        lines.append([row["name"], "" if flops is None else operations(flops), *texts])
    chances = ["" if column["chance"] is None else f"{100 * column['chance']:.2g}" for column in columns]
    lines.append(["chance", "", *chances])
    rule = ["---", *["---:"] * (len(columns) + 1)]
    table = "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in [lines[0], rule, *lines[1:]])
    changes = [f"- {row['name']}: {'; '.join(row['changes'])}" for row in found["rows"] if row.get("changes")]
    if changes:
        changes = ["Changed for equal terms:", "", *changes, ""]
    return "\n".join(["```", found["command"], "```", "", table, "", " ".join(remarks(found)), "", *changes])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
