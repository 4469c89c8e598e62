"""A recipe's cost as tables for the terminal."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from harmony.objectives.base import ImageRequest, Request
from harmony.training.cost import Cost

_GB = 2**30


def tables(cost: Cost) -> Group:
    """Parameters, passes, objectives and memory."""
    heading = Text(f"{cost.name}: {_operations(cost.flops)}FLOPs for each image-caption pair", style="bold")
    how = Text(
        f"forward and backward, a multiply-add counted as two; captions of {cost.caption_tokens} tokens; "
        f"{cost.examples} pairs at a time in {cost.precision}",
        style="dim",
    )
    return Group(heading, how, "", _objectives(cost), "", _passes(cost), "", _parameters(cost), "", _memory(cost))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold cyan", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column != "for" else "left")
    return table


def _objectives(cost: Cost) -> Table:
    table = _table("Objectives", "", "heads and loss", "share of passes", "FLOPs a pair", "")
    for name in sorted(cost.heads, key=cost.flops_of, reverse=True):
        own, whole = cost.heads[name], cost.flops_of(name)
        table.add_row(name, _operations(own), _operations(whole - own), _operations(whole), _percent(whole, cost.flops))
    return table


def _passes(cost: Cost) -> Table:
    table = _table("Encoder passes", "", "for", "tokens", "FLOPs a pair", "")
    for one in sorted(cost.passes, key=lambda one: (one.model, -one.flops)):
        what = f"{one.model}: {described(one.request)}"
        served = ", ".join(one.asked_by)
        table.add_row(what, served, f"{one.tokens:.0f}", _operations(one.flops), _percent(one.flops, cost.flops))
    return table


def described(request: Request) -> str:
    """What is encoded, in a few words."""
    if not isinstance(request, ImageRequest):
        return request.stream + (f", {request.replace} hidden" if request.replace else "")
    crops = request.crops or ()
    which = f"{request.view} crop {crops[0] + 1}" if len(crops) == 1 else f"{len(crops)} {request.view} crops"
    return which + (
        f", {request.replace} hidden" if request.replace else f", {request.keep} removed" if request.keep else ""
    )


def _parameters(cost: Cost) -> Table:
    table = _table("Parameters", "", "trained")
    for part, count in cost.trained.items():
        table.add_row(part, _count(count))
    table.add_section()
    table.add_row("all", _count(sum(cost.trained.values())))
    table.add_row("slow copies", _count(cost.slow), style="dim")
    for name, count in cost.frozen.items():
        table.add_row(f"{name} (frozen)", _count(count), style="dim")
    return table


def _memory(cost: Cost) -> Table:
    memory = cost.memory
    fullest = max(memory.groups, key=lambda group: memory.groups[group])
    table = _table("Memory of one process, at least", "", "GiB")
    table.add_row("weights", f"{memory.weights / _GB:.2f}")
    table.add_row("optimiser", f"{memory.optimiser / _GB:.2f}")
    table.add_row(f"gradients and activations (fullest: {', '.join(fullest)})", f"{memory.groups[fullest] / _GB:.2f}")
    table.add_section()
    table.add_row("all", f"{memory.total / _GB:.2f}")
    return table


def _operations(flops: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e3:.3g} k"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.2f} M" if parameters >= 1e5 else f"{parameters:,}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"
