"""The list of `harmony recipes`: every method by family, from the recipe files and what was counted of them.

Nothing here needs a model, so that the list is there at once. What has to be counted (which data a method reads, what
it costs) lies in recipes/_facts.yaml, which `python -m harmony.training.recipe_facts` writes and a test keeps true.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from harmony import recipe_files
from harmony.recipe_files import Values

FACTS = Path(__file__).parent / "recipes" / "_facts.yaml"

FAMILIES = {
    "joint": "Images and captions, several objectives at once",
    "language-image": "Images and captions",
    "self-distillation": "Images alone: self-distillation",
    "contrastive": "Images alone: contrast",
    "clustering": "Images alone: clustering",
    "reconstruction": "Images alone: reconstruction",
    "prediction": "Images alone: prediction of features",
}
"""Headings, in the order of the list."""


@dataclass
class Method:
    """One recipe with its smaller sizes.

    Attributes:
        name: the recipe's name.
        values: what its file says, with what it extends.
        smaller: names and values of recipes that are the same method at a smaller size.
    """

    name: str
    values: Values
    smaller: dict[str, Values] = field(default_factory=dict)


def methods() -> list[Method]:
    """The recipes of the package; those that only make another one smaller are listed with it."""
    values = {name: recipe_files.read(name) for name in recipe_files.names()}
    bases = {name: _made_smaller(name, values) for name in values}
    found = {name: Method(name, values[name]) for name, base in bases.items() if base is None}
    for name, base in bases.items():
        if base is not None:
            while (below := bases[base]) is not None:
                base = below
            found[base].smaller[name] = values[name]
    return list(found.values())


def _made_smaller(name: str, values: dict[str, Values]) -> str | None:
    """The recipe that `name` extends with a smaller tower, if that is what it does."""
    base = recipe_files.base(name)
    return base if base in values and _width(values[name]) != _width(values[base]) else None


def _width(values: Values) -> Any:
    image = values.get("model", {}).get("image")
    return image.get("width") if isinstance(image, dict) else None


@cache
def facts() -> dict[str, Values]:
    """By recipe: `of`, the hash of what was counted; `needs`, what it reads; `cost`, times CLIP's."""
    loaded = recipe_files.parse(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else None
    return loaded or {}


def counted(values: Values) -> str:
    """A hash of the parts of a recipe that its facts depend on."""
    parts = {key: values.get(key) for key in ("model", "views", "objectives")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def write_facts(found: dict[str, Values]) -> None:
    """Keep what was counted, a line for each recipe."""
    lines = [f"{name}: {{{recipe_files.written_in_line(found[name])}}}\n" for name in sorted(found)]
    FACTS.write_text(
        "# Written by `python -m harmony.training.recipe_facts`: what each recipe reads, and its FLOPs of an\n"
        "# image-caption pair as a multiple of those of clip with the same towers.\n" + "".join(lines),
        encoding="utf-8",
    )


def listing(width: int = 100) -> Group:
    """All methods, grouped by family, in `width` columns of a terminal."""
    every = methods()
    names = max(len(name) for method in every for name in (method.name, *(f"  {name}" for name in method.smaller)))
    groups = {family: [m for m in every if m.values.get("family") == family] for family in FAMILIES}
    parts: list[Table | Text] = []
    for family, members in groups.items():
        if members:
            parts += [Text(FAMILIES[family], style="bold"), _table(members, names, width, headed=not parts), Text()]
    told = (
        "cost: FLOPs of an image-caption pair, as a multiple of clip's with the same towers. Below a name: the same "
        "method at sizes for a CPU. `harmony recipes NAME` shows one with every setting explained."
    )
    return Group(*parts, Text(told, style="dim"))


_READS, _COST, _PAPER = 8, 5, 10
"""Columns for "captions", "6.13x" and "2405.14239"."""


def _table(members: Sequence[Method], names: int, width: int, headed: bool) -> Table:
    says = max(20, width - names - _READS - _COST - _PAPER - 5 * 2)
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, show_header=headed, header_style="dim")
    table.add_column("method", style="bold cyan", no_wrap=True, width=names)
    table.add_column("what it is, and what has been measured of it", width=says)
    table.add_column("reads", style="dim", width=_READS)
    table.add_column("cost", justify="right", no_wrap=True, width=_COST)
    table.add_column("arXiv", style="dim", no_wrap=True, width=_PAPER)
    for method in members:
        known = facts().get(method.name, {})
        smaller = [Text(f"  {name}", style="not bold") for name in method.smaller]
        description = Text(method.values.get("description", ""))
        table.add_row(
            Text("\n").join([Text(method.name), *smaller]),
            Text("\n").join([description, *_proofs(method)]),
            "\n".join(known.get("needs", [])),
            f"{known['cost']:.2f}x" if "cost" in known else "",
            method.values.get("paper", "").removeprefix("arXiv "),
        )
    return table


def _proofs(method: Method) -> list[Text]:
    """What has been measured, of the method and of its smaller sizes."""
    named = {"": method.values.get("proof"), **{f"{name}: ": v.get("proof") for name, v in method.smaller.items()}}
    return [Text(f"{name}{proof}", style="green") for name, proof in named.items() if proof]
