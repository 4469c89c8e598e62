"""The sections with curves: losses, signs of collapse, what the optimiser did, and speed."""

import math
from collections.abc import Mapping, Sequence

from harmony.evaluation.report.charts import Line, Mark, chart
from harmony.evaluation.report.cost import cost_tables, counted
from harmony.evaluation.report.html import Html, Section, joined, note, operations, tag
from harmony.evaluation.report.log import Curve, Log
from harmony.evaluation.report.words import LOSSES, OTHER_SIGN, SIGNS
from harmony.recipe import Recipe
from harmony.training.cost import Cost

_COLOURS = (1, 2, 3, 5, 6, 7, 8, 4)
_NEUTRAL = 0


def losses(log: Log, recipe: Recipe) -> Section:
    """The weighted sum, and every loss by itself."""
    each, colour = log.under("loss"), _colours(recipe)
    charts = []
    total = log.curve("loss")
    if total and len(each) > 1:
        says = "The weighted sum, which the optimiser sees."
        charts.append(chart("all together", says, [Line("loss", total, _NEUTRAL)]))
    for name, curve in each.items():
        line = Line(name, curve, colour.get(name.split("/")[0], 1))
        says = LOSSES.get(_kind(name, recipe), "")
        charts.append(chart(_spaced(name), says, [line], _unlearned(name, recipe)))
    changing = {name: curve for name, curve in log.under("weight").items() if curve.changes}
    if changing:
        says = "The factors of those losses whose weight changes."
        charts.append(chart("weights", says, _lines(changing, recipe), smooth=False))
    if not charts:
        return Section("losses", "Losses", note("No step has been logged yet, so there are no curves."))
    lead = (
        "Each loss unweighted, as logged (pale) and as a running mean. "
        "The number beside a title is the mean of the last tenth of the run."
    )
    return Section("losses", "Losses", _grid(charts), lead)


def signs(log: Log, recipe: Recipe) -> Section | None:
    """Signs of collapse and of learning, each explained; one chart a sign, with a line for each that gives it."""
    by_sign: dict[str, dict[str, Curve]] = {}
    for key, curve in log.under("sign").items():
        owner, _, sign = key.rpartition("/")
        by_sign.setdefault(sign, {})[owner or sign] = curve
    by_sign.pop("temperature", None)  # drawn among the optimiser's curves
    known = list(SIGNS)
    charts = []
    for sign in sorted(by_sign, key=lambda name: known.index(name) if name in known else len(known)):
        words, curves = SIGNS.get(sign, OTHER_SIGN), dict(sorted(by_sign[sign].items()))
        marks = _even_guesses(curves, recipe) if sign == "target_entropy" else []
        charts.append(chart(words.title or _spaced(sign), words.says, _lines(curves, recipe), marks, share=words.share))
    if not charts:
        return None
    lead = "What shows a collapse before the losses do: to settle is healthy, to run to a bound is not."
    return Section("health", "Signs of health", _grid(charts), lead)


def optimisation(log: Log, recipe: Recipe) -> Section | None:
    """Learning rate, temperature, gradient norms and whatever else is scheduled."""
    charts: list[Html] = []
    if curve := log.curve("lr"):
        says = "A linear warm-up, then a cosine."
        charts.append(chart("learning rate", says, [Line("rate", curve, _NEUTRAL)], smooth=False))
    for key, says in (
        ("weight_decay", "How strongly weights are pulled towards zero."),
        ("teacher_momentum", "Share of its weights that the teacher keeps at each step; at 1 it stands still."),
        ("loss_scale", "Keeps fp16 gradients representable; it is halved after an overflow."),
    ):
        curve = log.curve(key)
        if curve.changes:
            charts.append(chart(_spaced(key), says, [Line(key, curve, _NEUTRAL)], smooth=False))
    if curve := log.curve("temperature"):
        says = "Learned, of the contrastive similarities; it falls as pairs become easy to tell apart."
        charts.append(chart("temperature", says, [Line("temperature", curve, 1)], [Mark(0.01, "lowest allowed")]))
    charts += _gradients(log, recipe)
    return Section("optimisation", "Optimisation", _grid(charts)) if charts else None


def _gradients(log: Log, recipe: Recipe) -> list[Html]:
    """Norms of the gradient: of all parameters, of the towers, and of what belongs to each objective."""
    charts = []
    if curve := log.curve("grad_norm"):
        clip = recipe.optim.clip_norm
        marks = [Mark(clip, "clipped above")] if clip and recipe.optim.clip_scope == "all" else []
        says = "Over all parameters, before clipping."
        charts.append(chart("gradient norm", says, [Line("all", curve, _NEUTRAL)], marks))
    parts = log.under("grad_norm")
    towers = {name: curve for name, curve in parts.items() if name in ("image", "text")}
    heads = {name: curve for name, curve in parts.items() if name not in towers}
    for title, chosen, says in (
        ("gradient norm, towers", towers, "The two encoders; one far above the other learns at its cost."),
        ("gradient norm, heads", heads, "What belongs to each objective: projection heads and decoders."),
    ):
        if chosen:
            charts.append(chart(title, says, _lines(chosen, recipe)))
    return charts


def speed(log: Log, recipe: Recipe) -> Section:
    """What a pair costs, throughput, waiting for data and memory."""
    cost = counted(recipe)
    charts = [_operations(cost, recipe)]
    for key, title, says, share in (
        ("examples_per_second", "pairs a second", "Training throughput over all processes.", False),
        ("data_wait", "waiting for data", "Share of the time the model stood still for the loader to catch up.", True),
        ("memory_gib", "peak memory, GiB", "Of the GPU, or of the main process on a CPU.", False),
    ):
        if curve := log.curve(key):
            charts.append(chart(title, says, [Line(title, curve, _NEUTRAL)], share=share, smooth=key != "memory_gib"))
    return Section("speed", "Cost and speed", joined([_grid(charts), cost_tables(cost)]))


def _operations(cost: Cost, recipe: Recipe) -> Html:
    """Floating-point operations of a training step, for each objective; passes that several share are split evenly."""
    colour = _colours(recipe)
    rows = [(_spaced(name), cost.flops_of(name), colour.get(name, 1)) for name in cost.heads]
    says = "Operations of one training step for a pair, by objective."
    largest = max(flops for _, flops, _ in rows)
    drawn = [
        tag(
            "div",
            tag("span", name, class_="label"),
            tag("span", tag("i", class_=f"c{colour}", style=f"width:{100 * flops / largest:.1f}%"), class_="track"),
            tag("span", operations(flops), class_="value"),
            class_="bar",
        )
        for name, flops, colour in rows
    ]
    head = tag("div", tag("h3", "cost of a pair"), tag("span", operations(cost.flops), class_="now"), class_="head")
    return tag("figure", head, tag("div", *drawn, class_="bars"), tag("figcaption", says), class_="chart")


def _grid(charts: Sequence[Html]) -> Html:
    return tag("div", *charts, class_="charts")


def _spaced(name: str) -> str:
    return name.replace("_", " ").replace("/", ", ")


def _colours(recipe: Recipe) -> dict[str, int]:
    """The colour each objective has all over the page."""
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(recipe.objectives)}


def _lines(curves: Mapping[str, Curve], recipe: Recipe) -> list[Line]:
    """One line a curve: objectives in their own colours, everything else in those that are left."""
    own = _colours(recipe)
    taken = {own[name] for name in curves if name in own}
    free = [colour for colour in _COLOURS if colour not in taken] * len(curves)
    others = iter(free or _COLOURS * len(curves))
    return [Line(_spaced(name), curve, own[name] if name in own else next(others)) for name, curve in curves.items()]


def _kind(name: str, recipe: Recipe) -> str:
    """The kind of objective behind a loss."""
    config = recipe.objectives.get(name.split("/")[0])
    return config.type if config is not None and config.type else name


def _unlearned(name: str, recipe: Recipe) -> list[Mark]:
    """What the loss would be if nothing had been learned."""
    kind, config = _kind(name, recipe), recipe.objectives.get(name.split("/")[0])
    if kind in ("dino", "ibot", "text_distillation"):
        return _even_guesses([name], recipe)
    if kind == "mae" and getattr(config, "normalise_targets", False) and getattr(config, "over_crops", "") == "mean":
        return [Mark(1.0, "each patch's mean")]
    return []


def _even_guesses(names: Mapping[str, Curve] | Sequence[str], recipe: Recipe) -> list[Mark]:
    """The entropy of an even guess over the prototypes of the named objectives."""
    counts = {_prototypes(name, recipe) for name in names}
    return [Mark(math.log(count), f"even guess over {count:,}") for count in sorted(c for c in counts if c)]


def _prototypes(name: str, recipe: Recipe) -> int | None:
    """Number of prototypes of an objective's head, its own or the one that another objective lends it."""
    head = getattr(recipe.objectives.get(name), "head", None)
    if isinstance(head, str):
        head = getattr(recipe.objectives.get(head), "head", None)
    return getattr(head, "prototypes", None)
