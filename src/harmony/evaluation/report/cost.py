"""What a training step costs, counted on the recipe itself: operations, tokens and parameters."""

from harmony.evaluation.report.html import Html, folded, joined, operations, percent, table, tag
from harmony.recipe import Recipe
from harmony.training.cost import Cost, cost_of
from harmony.training.cost_tables import described


def counted(recipe: Recipe) -> Cost:
    """The cost of the recipe's step, counted on two examples: what it costs an example is the same for any number."""
    few = recipe.data.model_copy(update={"batch_size": 2 * recipe.train.accumulate})
    return cost_of(recipe.model_copy(update={"data": few}))


def cost_tables(cost: Cost) -> Html:
    """By objective: tokens and operations an example; by part: parameters; and every encoder pass, folded away."""
    says = (
        "What training on one image-caption pair takes, forward and backward, a multiply-add counted as two; passes "
        f"that serve several objectives are split evenly among them. Captions of {cost.caption_tokens} tokens."
    )
    names = sorted(cost.heads, key=cost.flops_of, reverse=True)
    rows = [
        (
            name.replace("_", " "),
            f"{_tokens(cost, name):,.0f}",
            operations(cost.heads[name]),
            operations(cost.flops_of(name) - cost.heads[name]),
            operations(cost.flops_of(name)),
            percent(cost.flops_of(name) / cost.flops),
        )
        for name in names
    ]
    total = sum(_tokens(cost, name) for name in names)
    rows.append(("all", f"{total:,.0f}", operations(sum(cost.heads.values())), "", operations(cost.flops), ""))
    by_objective = table(("objective", "tokens", "heads and loss", "its share of passes", "together", ""), rows)
    parameters = [(part.replace("_", " "), f"{count:,}") for part, count in cost.trained.items()]
    parameters += [("all that is trained", f"{sum(cost.trained.values()):,}"), ("slow copies", f"{cost.slow:,}")]
    passes = [
        (f"{one.model}: {described(one.request)}", ", ".join(one.asked_by), f"{one.tokens:,.0f}", operations(one.flops))
        for one in sorted(cost.passes, key=lambda one: (one.model, -one.flops))
    ]
    sides = [
        tag("div", tag("h3", "Cost of a pair"), by_objective),
        tag("div", tag("h3", "Parameters"), table(("part", "trained"), parameters)),
    ]
    every = folded("Every encoder pass", table(("pass", "serves", "tokens", "operations"), passes, words=(1,)))
    return joined([tag("div", *sides, class_="columns counted"), tag("p", says, class_="says"), every])


def _tokens(cost: Cost, objective: str) -> float:
    """Tokens an example that an objective has encoded, its even share of every pass it asked for."""
    return sum(one.tokens / len(one.asked_by) for one in cost.passes if objective in one.asked_by)
