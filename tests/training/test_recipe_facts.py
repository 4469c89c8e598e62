"""What the list of recipes says was counted, and is still so."""

import pytest
from shrunk import shrunk

from harmony import recipe as recipes
from harmony import recipe_list
from harmony.recipe_list import counted, facts, methods, write_facts
from harmony.training import recipe_facts
from harmony.training.cost import flops_of_a_pair
from harmony.training.learner import build_learner

METHODS = {method.name: method for method in methods()}


@pytest.mark.parametrize("name", METHODS)
def test_what_was_counted_is_the_recipe_as_it_is(name: str):
    fact = facts().get(name, {})
    told = f"run `python -m harmony.training.recipe_facts`: {name} is new or has changed"
    assert fact.get("of") == counted(METHODS[name].values), told
    assert fact["cost"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_what_a_recipe_reads_is_what_its_learner_asks_for(name: str):
    assert facts()[name]["needs"] == recipe_facts.needs(build_learner(shrunk(name)))


def test_a_cost_counted_again_is_the_same():
    """Counted in shallow towers: FLOPs are linear in depth."""

    def at_depth_12(name: str, *sizes: str) -> float:
        shallow = [
            flops_of_a_pair(recipes.resolve(name, ["data.batch_size=8", *(f"{size}={depth}" for size in sizes)]))
            for depth in (1, 2)
        ]
        return shallow[0] + 11 * (shallow[1] - shallow[0])

    clip = at_depth_12("clip", "model.image.depth", "model.text.layers")
    assert at_depth_12("mae", "model.image.depth") / clip == pytest.approx(facts()["mae"]["cost"], rel=1e-3)
    assert facts()["clip"]["cost"] == 1


def test_smaller_sizes_are_listed_with_their_method():
    assert {"quickstart", "flickr8k-small"} <= METHODS["harmony"].smaller.keys()
    assert list(METHODS["maskclip"].smaller) == ["maskclip-small"]
    assert {"harmony-published", "clip-strong"} <= METHODS.keys(), "these are other methods at the same size"


def test_only_what_has_changed_is_counted_again(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_list, "FACTS", tmp_path / "facts.yaml")
    known = {name: {"of": counted(method.values), "needs": ["images"], "cost": 2.0} for name, method in METHODS.items()}
    write_facts(known | {"mae": {"of": "another", "needs": ["images"], "cost": 2.0}, "gone": known["clip"]})
    facts.cache_clear()
    try:
        asked: list[str] = []
        monkeypatch.setattr(recipe_facts, "count", lambda name: asked.append(name) or known["clip"] | {"cost": 3.0})
        recipe_facts.main(every=False)
        facts.cache_clear()
        assert asked == ["mae"]
        assert facts()["mae"]["cost"] == 3 and facts()["dino"] == known["dino"] and "gone" not in facts()
    finally:
        facts.cache_clear()


def test_labels_and_frozen_models_are_needed_by_those_that_use_them():
    needs = {name: set(fact["needs"]) for name, fact in facts().items()}
    assert [name for name in needs if "labels" in needs[name]] == ["supcon"]
    assert [name for name in needs if "frozen model" in needs[name]] == ["beit"]
    assert "captions" in needs["maskclip"] and "images" in needs["mae"]
