"""compare.html: one self-contained page with the table, the curves, every run, and what was made equal."""

from collections.abc import Mapping
from typing import Any

from harmony.comparison import curves
from harmony.comparison.plan import Plan
from harmony.comparison.rows import UNTRAINED
from harmony.comparison.table import remarks, shown
from harmony.evaluation.report import document
from harmony.evaluation.report.html import Html, Section, folded, joined, operations, percent, table, tag
from harmony.evaluation.report.results import short_uri


def page(found: Mapping[str, Any], plan: Plan, name: str) -> str:
    """The page.

    Args:
        found: the numbers (`harmony.comparison.table.numbers`).
        plan: what was compared, for the recipes.
        name: of the comparison's directory.
    """
    sections = [_table(found), *curves.sections(found), _runs(found), _terms(found, plan)]
    return document(f"{name} · Harmony", _head(found, name), sections, by="harmony compare")


def _head(found: Mapping[str, Any], name: str) -> Html:
    chips = [
        tag("li", row["name"], tag("small", operations(row["flops_a_pair"])), class_="chip")
        for row in found["rows"]
        if row["name"] != UNTRAINED
    ]
    facts = [
        ("pairs", f"{found['pairs']['examples']:,} of {short_uri(found['pairs']['uri'])}"),
        ("seen by each run", f"{found['examples']:,} ({found['steps']:,} steps of {found['batch_size']:,})"),
        ("measured on", short_uri(found["measured_on"])),
        ("labels learned from", short_uri(found["learned_from"])),
        ("seeds", ", ".join(map(str, found["seeds"]))),
        ("run with", ", ".join(f"{package} {number}" for package, number in found["versions"].items())),
    ]
    return tag(
        "header",
        tag("p", "Harmony · comparison", class_="eyebrow"),
        tag("h1", name),
        tag("p", "The same data, model, batch and length for every row.", class_="lead"),
        tag("ul", *chips, class_="chips"),
        tag("dl", *(tag("div", tag("dt", term), tag("dd", value)) for term, value in facts), class_="facts"),
    )


def _table(found: Mapping[str, Any]) -> Section:
    columns, first = found["columns"], found["rows"][1]["flops_a_pair"]
    rows: list[list[object]] = []
    for row in found["rows"]:
        cells = [_cell(row["cells"][column["key"]]) for column in columns]
        flops = row["flops_a_pair"]
        cost = ("", "") if flops is None else (operations(flops), f"{flops / first:.2f} x")
        rows.append([row["name"], *cost, *cells])
    chances = ["" if column["chance"] is None else percent(column["chance"]) for column in columns]
    rows.append(["chance", "", "", *(tag("small", chance) for chance in chances)])
    titles = [joined(column["title"].split(", ", 1), Html("<br>")) for column in columns]
    head = ["method", "operations a pair", f"of {found['rows'][1]['name']}", *titles]
    missing = {f"{row['name']}: {reason}" for row in found["rows"] for reason in row["missing"].values()} | {
        f"{row['name']}, seed {seed}: {run['failed']}"
        for row in found["rows"]
        for seed, run in row["runs"].items()
        if run["failed"]
    }
    parts: list[object] = [table(head, rows), *(tag("p", says, class_="says") for says in [" ".join(remarks(found))])]
    if missing:
        parts.append(folded("What is not there, and why", tag("ul", *(tag("li", each) for each in sorted(missing)))))
    return Section("table", "Table", joined(parts))


def _cell(cell: Mapping[str, Any]) -> Html:
    if "mean" not in cell:
        return tag("small", shown(cell), title=cell["missing"])
    mean, _, rest = shown(cell).partition(" ")
    return joined([tag("strong" if cell["best"] else "span", mean), tag("small", rest) if rest else ""])


def _runs(found: Mapping[str, Any]) -> Section:
    """Every run by itself."""
    columns = found["columns"]
    rows = []
    for row in found["rows"]:
        for seed, run in row["runs"].items():
            values = [run["metrics"].get(column["task"], {}).get(column["metric"]) for column in columns]
            texts = ["failed" if run["failed"] else "n/a" if value is None else percent(value) for value in values]
            rows.append([row["name"], seed, *texts])
    head = ["method", "seed", *(column["title"] for column in columns)]
    return Section("runs", "Every run", folded("By seed", table(head, rows)))


def _terms(found: Mapping[str, Any], plan: Plan) -> Section:
    """What was changed of each recipe, and the recipes as they were trained."""
    rows = []
    for row in found["rows"]:
        if row["name"] != UNTRAINED:
            named = " ".join([row["recipe"], *row["overrides"]])
            rows.append([row["name"], named, row["copy"], "; ".join(row["changes"]) or "nothing"])
    lead = (
        f"Data, image model, batch, length and precision are those of {plan.entries[0].name}, and the text tower's "
        "sizes those of the first row that has one; everything else is each recipe's own."
    )
    wrapped = [[name, tag("span", recipe, class_="wrap"), copy, tag("span", changes, class_="wrap")]
               for name, recipe, copy, changes in rows]  # fmt: skip
    parts = [
        table(("method", "recipe", "measured copy", "changed for equal terms"), wrapped, words=(1, 2, 3)),
        *(folded(f"The recipe of {entry.name}", tag("pre", entry.row.recipe.to_yaml())) for entry in plan.entries),
        tag("p", "Made by:", class_="says"),
        tag("pre", found["command"]),
    ]
    return Section("terms", "Equal terms", joined(parts), lead)
