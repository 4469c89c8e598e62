"""What a recipe reads and what it costs, counted on its own learner, for the list of recipes.

python -m harmony.training.recipe_facts           counts recipes that are new or have changed
python -m harmony.training.recipe_facts --all     counts every one, after a change of code
"""

import sys
from functools import cache

from harmony import recipe as recipes
from harmony import recipe_files
from harmony.data.masks import WordSampler
from harmony.recipe import Recipe
from harmony.recipe_files import Values, written_in_line
from harmony.recipe_list import counted, facts, methods, write_facts
from harmony.training.cost import flops_of_a_pair
from harmony.training.learner import Learner
from harmony.training.rehearsal import rehearse

_EXAMPLES = "data.batch_size=8"
"""Costs are of one example; what a loss does across a batch is next to nothing beside the towers."""


def count(name: str) -> Values:
    """What the list of recipes says of one: a hash of what was counted, what it reads, its cost in CLIPs."""
    recipe = recipes.resolve(name, [_EXAMPLES, "train.accumulate=1"])
    learner = rehearse(recipe, caption_tokens=24).learner
    cost = flops_of_a_pair(recipe) / _clip(_towers(recipe), recipe.largest_view)
    return {"of": counted(recipe_files.read(name)), "needs": needs(learner), "cost": float(f"{cost:.4g}")}


def needs(learner: Learner) -> list[str]:
    """What a step of the learner reads: images or captions with them, labels, and models that are not trained."""
    plan = learner.plan
    passes = [plan.teacher, *(group.student for group in plan.groups)]
    reads = any(one.texts for one in passes) or any(isinstance(mask, WordSampler) for mask in learner.masks().values())
    more = {"labels": learner.needs_labels(), "frozen model": bool(plan.frozen)}
    return ["captions" if reads else "images", *(name for name, needed in more.items() if needed)]


@cache
def _clip(towers: tuple[str, ...], size: int) -> float:
    """FLOPs of a pair in CLIP with the given towers, at the given size of its crop."""
    return flops_of_a_pair(recipes.resolve("clip", [_EXAMPLES, f"views.global.size={size}", *towers]))


def _towers(recipe: Recipe) -> tuple[str, ...]:
    """As overrides; without a text tower CLIP keeps its own."""
    model = recipe.to_dict()["model"]
    parts = {"image": model["image"], "text": model["text"], "embed": model["embed"]}
    return tuple(f"model.{key}={written_in_line({'v': value})[3:]}" for key, value in parts.items() if value)


def main(every: bool) -> None:
    """Bring the facts up to date."""
    known = {} if every else facts()
    found: dict[str, Values] = {}
    for method in methods():
        old = known.get(method.name)
        found[method.name] = old if old and old["of"] == counted(method.values) else count(method.name)
        sys.stdout.write(f"{method.name}: {found[method.name]}\n")
    write_facts(found)


if __name__ == "__main__":
    main("--all" in sys.argv[1:])
