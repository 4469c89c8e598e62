"""The benchmark of scaling counts what a formula says, and compares as it says."""

import pytest

from benchmarks import scaling
from benchmarks.tiny import TINY_HARMONY


def test_a_rank_of_many_is_counted_without_the_others():
    recipe = scaling.recipe_of("quickstart", TINY_HARMONY, 3)
    found = scaling.count(recipe, 512)
    embeddings, gradients = 3 * 16 * 4, found["crossing"]["gradients: all_reduce"]["bytes"]
    assert found["crossing"]["objectives/clip: all_gather"] == {"calls": 4, "bytes": 4 * embeddings}
    assert found["crossing"]["losses: backward: all_reduce"] == {"calls": 2, "bytes": 2 * 512 * embeddings}
    assert sum(found["final_after"].values()) == gradients
    assert found["bytes_sent"]["gradients"] == pytest.approx(gradients * 2 * 511 / 512)
    assert list(found["final_after"]) == ["dino+ibot", "mae", "clip", "mlm+text_distillation"]


def test_one_process_is_timed_and_sends_nothing():
    found = scaling.timed(scaling.recipe_of("quickstart", TINY_HARMONY, 2), steps=2, after=False)
    assert (found["ranks"], found["crossing"]) == (1, {})
    assert len(found["steps_s"]) == len(found["waited_s"]) == 2


def test_efficiency_is_the_share_of_twice_what_one_process_does():
    def way(seconds: list[float]) -> dict:
        parts = {"crossing": {"a: all_reduce": {"calls": 1, "bytes": 10}, "b: all_gather": {"calls": 2, "bytes": 5}}}
        return parts | {"steps_s": seconds, "processor_s": seconds, "waited_s": [0.0]}

    ways = {"one": way([1.0, 3.0, 2.0]), "two": way([2.0, 4.0, 4.0])}
    found = scaling.compared(ways, batch=8)
    assert found["one"]["pairs_per_s"] == 4
    assert found["two"]["pairs_per_s"] == 4
    assert found["two"]["efficiency"] == found["two"]["pairs_per_s"] / (2 * found["one"]["pairs_per_s"])
    assert found["two"]["efficiency_of_best"] == 0.5
    assert found["two"]["bytes_per_step"] == 15
