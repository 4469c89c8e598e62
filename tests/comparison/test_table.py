"""Mean, spread and the best of each column."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmony.comparison.table import mark_best, markdown, shown, spread


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_spread_is_the_standard_deviation_of_a_sample(values):
    assert spread(values) == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_one_value_has_no_spread():
    assert spread([0.5]) is None
    assert shown({"mean": 0.5, "spread": None, "failed": 0}) == "50.0"


def cells(*means):
    return [{"missing": "no texts"} if mean is None else {"mean": mean} for mean in means]


@pytest.mark.parametrize(
    ("means", "best"),
    [
        ((0.1, 0.5, 0.3), [1]),
        ((0.5, None, 0.5), [0, 2]),
        ((0.50049, 0.49951, 0.4989), [0, 1]),  # 50.0, 50.0 and 49.9 as shown
        ((None, None), []),
    ],
)
def test_the_best_and_whatever_equals_it_as_shown(means, best):
    row = cells(*means)
    mark_best(row)
    assert [place for place, cell in enumerate(row) if cell.get("best")] == best


def test_cells_in_words():
    assert shown({"missing": "it has no text tower"}) == "n/a"
    assert shown({"missing": "failed"}) == "failed"
    assert shown({"mean": 0.1234, "spread": 0.005, "failed": 1}) == "12.3 ± 0.5 (1 failed)"


def test_markdown_has_a_line_for_every_row():
    column = {"key": "knn/top1", "task": "knn", "metric": "top1", "title": "kNN", "chance": 0.125}
    value = {"mean": 0.5, "spread": None, "failed": 0, "best": True}
    untrained = {"name": "untrained", "like": "a", "flops_a_pair": None}
    trained = {"name": "a|b", "flops_a_pair": 2e9, "changes": ["x 1 → 2"], "copy": "student"}
    untrained["cells"], trained["cells"] = {"knn/top1": value | {"mean": 0.1, "best": False}}, {"knn/top1": value}
    found = {"command": "harmony compare a b", "columns": [column], "rows": [untrained, trained], "seeds": [0]}
    found |= {
        "begins_untrained": True,
        "begin_elsewhere": [],
        "versions": {"torch": "2.14.0 and 2.15.0", "timm": "1.0"},
    }
    found |= {"examples": 32, "steps": 4, "batch_size": 8}
    found |= {"pairs": {"uri": "scenes:"}, "measured_on": "scenes:val", "learned_from": "scenes:"}
    lines = markdown(found).splitlines()
    assert "| untrained |  | 10.0 |" in lines
    assert "| a\\|b | 2 GFLOP | **50.0** |" in lines
    assert "| chance |  | 12 |" in lines
    assert "- a|b: x 1 → 2" in lines
    assert any("untrained is the model of a before its first step." in line for line in lines)
    assert any("Not all runs are of the same software: torch 2.14.0 and 2.15.0." in line for line in lines)
    assert not any("other positions" in line for line in lines)
    lines = markdown(found | {"begin_elsewhere": ["b", "c"]}).splitlines()
    assert any("Begun from a tower with other positions than untrained: b, c." in line for line in lines)
    lines = markdown(found | {"begins_untrained": False}).splitlines()
    assert any("untrained is the model of a as it is drawn, without model.init." in line for line in lines)
