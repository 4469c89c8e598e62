"""The sections with curves: losses, signs of collapse, what the optimiser did, and speed."""

import math
from collections.abc import Mapping

from harmony.evaluation.report.charts import Line, Mark, chart
from harmony.evaluation.report.html import Html, Section, note, tag
from harmony.evaluation.report.log import Curve, Log
from harmony.evaluation.report.words import LOSSES, OTHER_SIGN, SIGNS
from harmony.recipe import Recipe

OBJECTIVE_COLOURS = (1, 2, 3, 5, 6, 7, 8, 4)


def colours(recipe: Recipe) -> dict[str, int]:
    """The colour each objective has all over the page."""
    return {name: OBJECTIVE_COLOURS[i % 8] for i, name in enumerate(recipe.objectives)}


def losses(log: Log, recipe: Recipe) -> Section | None:
    """The weighted sum and every loss by itself."""
    by_name, colour = log.under("loss"), colours(recipe)
    charts = [
        chart(
            name,
            _meaning(name, recipe),
            [Line(name, curve, colour.get(name.split("/")[0], 1))],
            _marks(name, recipe, curve),
        )
        for name, curve in by_name.items()
    ]
    total = log.curve("loss")
    if total and len(by_name) > 1:
        charts.insert(0, chart("all together", "The weighted sum, which the optimiser sees.", [Line("loss", total, 0)]))
    weights = {name: curve for name, curve in log.under("weight").items() if max(curve.values) != min(curve.values)}
    if weights:
        lines = [Line(name, curve, colour.get(name.split("/")[0], 1)) for name, curve in weights.items()]
        charts.append(chart("weights", "The factors of those losses whose weight changes.", lines, smooth=False))
    if not charts:
        return None
    lead = (
        "Each loss unweighted, as logged (pale) and as a running mean. "
        "The number beside a title is the mean of the last tenth of the run."
    )
    return Section("losses", "Losses", _grid(charts), lead)


def signs(log: Log, recipe: Recipe) -> Section | None:
    """Signs of collapse and of learning, each explained."""
    by_sign: dict[str, dict[str, Curve]] = {}
    for key, curve in log.under("sign").items():
        owner, _, sign = key.rpartition("/")
        by_sign.setdefault(sign, {})[owner] = curve
    order = list(SIGNS)
    charts = []
    for sign in sorted(by_sign, key=lambda name: order.index(name) if name in order else len(order)):
        if sign == "temperature":
            continue
        words = SIGNS.get(sign, OTHER_SIGN)
        lines = _lines(by_sign[sign], recipe)
        charts.append(
            chart(
                words.title or sign.replace("_", " "),
                words.says,
                lines,
                _sign_marks(sign, by_sign[sign], recipe),
                share=words.share,
            )
        )
    if not charts:
        return None
    lead = "What would show a collapse before the losses do. Curves that settle are healthy; curves that run to a bound are not."
    return Section("health", "Signs of health", _grid(charts), lead)


def optimisation(log: Log, recipe: Recipe) -> Section | None:
    """Learning rate, temperature, gradient norms and what else is scheduled."""
    charts: list[Html] = []
    for key, title, says in (
        ("lr", "learning rate", "Linear warm-up, then a cosine."),
        ("weight_decay", "weight decay", "Pulls weights towards zero, more strongly as the run goes on."),
        (
            "teacher_momentum",
            "teacher momentum",
            "Share of its weights that the teacher keeps at each step; at 1 it stands still.",
        ),
    ):
        if curve := log.curve(key):
            charts.append(chart(title, says, [Line(title, curve, 0)], smooth=False))
    if curve := log.curve("temperature"):
        says = "Learned, of the contrastive similarities: it falls as pairs become easy to tell apart, to 0.01 at the least."
        charts.append(chart("temperature", says, [Line("temperature", curve, 1)], [Mark(0.01, "bound")]))
    if curve := log.curve("grad_norm"):
        clip = recipe.optim.clip_norm
        marks = [Mark(clip, "clipped above")] if clip and recipe.optim.clip_scope == "all" else []
        charts.append(chart("gradient norm", "Over all parameters, before clipping.", [Line("all", curve, 0)], marks))
    parts = log.under("grad_norm")
    towers = {name: curve for name, curve in parts.items() if name in ("image", "text")}
    heads = {name: curve for name, curve in parts.items() if name not in towers}
    for title, chosen, says in (
        ("gradient norm, towers", towers, "The two encoders; one far above the other learns at its cost."),
        ("gradient norm, heads", heads, "What belongs to each objective: projection heads and decoders."),
    ):
        if chosen:
            charts.append(chart(title, says, _lines(chosen, recipe)))
    if curve := log.curve("loss_scale"):
        charts.append(
            chart(
                "loss scale",
                "Factor that keeps fp16 gradients representable; it halves after an overflow.",
                [Line("scale", curve, 0)],
                smooth=False,
            )
        )
    return Section("optimisation", "Optimisation", _grid(charts)) if charts else None


def speed(log: Log) -> Section | None:
    """Throughput, waiting for data and memory."""
    charts = []
    for key, title, says, share in (
        ("examples_per_second", "pairs a second", "Training throughput over all processes.", False),
        ("data_wait", "waiting for data", "Share of the time the model stood still because the loader was behind; above a tenth, more workers pay.", True),
        ("memory_gib", "peak memory, GiB", "Of the GPU, or of the main process on a CPU.", False),
    ):  # fmt: skip
        if curve := log.curve(key):
            charts.append(chart(title, says, [Line(title, curve, 0)], share=share, smooth=key != "memory_gib"))
    return Section("speed", "Speed", _grid(charts)) if charts else None


def _grid(charts: list[Html]) -> Html:
    return tag("div", *charts, class_="charts")


def _lines(curves: Mapping[str, Curve], recipe: Recipe) -> list[Line]:
    colour = colours(recipe) | {"image": 1, "text": 2}
    free = [c for c in OBJECTIVE_COLOURS if c not in [colour[name] for name in curves if name in colour]]
    return [
        Line(name.replace("_", " "), curve, colour[name] if name in colour else free.pop(0) if free else 1)
        for name, curve in curves.items()
    ]


def _kind(name: str, recipe: Recipe) -> str:
    config = recipe.objectives.get(name.split("/")[0])
    return config.type if config is not None and config.type else name


def _meaning(name: str, recipe: Recipe) -> str:
    return LOSSES.get(_kind(name, recipe), "")


def _marks(name: str, recipe: Recipe, curve: Curve) -> list[Mark]:
    """What the loss would be if nothing had been learned."""
    kind, config = _kind(name, recipe), recipe.objectives.get(name.split("/")[0])
    if kind in ("dino", "ibot", "text_distillation"):
        prototypes = _prototypes(name, recipe)
        return [Mark(math.log(prototypes), f"even guess, log {prototypes:,}")] if prototypes else []
    if kind == "mae" and getattr(config, "normalise_targets", False) and getattr(config, "over_crops", "") == "mean":
        return [Mark(1.0, "each patch's mean")]
    return []


def _sign_marks(sign: str, curves: Mapping[str, Curve], recipe: Recipe) -> list[Mark]:
    if sign != "target_entropy":
        return []
    counts = {_prototypes(name, recipe) for name in curves} - {None}
    return [Mark(math.log(count), f"log {count:,}") for count in counts if count]


def _prototypes(name: str, recipe: Recipe) -> int | None:
    """Number of prototypes of an objective's head, its own or the one that another objective lends it."""
    head = getattr(recipe.objectives.get(name), "head", None)
    if isinstance(head, str):
        head = getattr(recipe.objectives.get(head), "head", None)
    return getattr(head, "prototypes", None)


def empty() -> Html:
    return note("No step has been logged yet, so there are no curves.")
